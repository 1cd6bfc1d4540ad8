"""What every artifact store promises, whatever keeps its blobs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bus import topology
from bus.artifacts import ArtifactStore, DirectoryArtifacts, JetStreamArtifacts, digest_of
from bus.s3_artifacts import S3Artifacts
from helmr import ids
from helmr.errors import ConfigError, HelmrError, NotAllowed, NotFound, Unavailable
from tests.chaos.proxy import Proxy
from tests.integration.platform import Platform
from tests.s3_service import S3Service, serving

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def service() -> Iterator[S3Service]:
    with serving() as service:
        yield service


@pytest.fixture
def s3(service: S3Service, monkeypatch: pytest.MonkeyPatch) -> S3Service:
    service.allow(monkeypatch)
    return service


@pytest.fixture(params=["jetstream", "directory", "s3"])
async def store(request: pytest.FixtureRequest, platform: Platform, tmp_path: Path) -> AsyncIterator[ArtifactStore]:
    if request.param == "directory":
        yield DirectoryArtifacts(tmp_path / "store")
        return
    if request.param == "s3":
        yield S3Artifacts(request.getfixturevalue("s3").place(ids.new("ws")))
        return
    store = JetStreamArtifacts(platform.nc, topology.VERSIONS)
    before = {each.digest async for each in store.all()}
    yield store
    for each in [each.digest async for each in store.all()]:
        if each not in before:
            await store.delete(each)


def _blob(size: int) -> tuple[str, bytes]:
    data = os.urandom(size)
    return digest_of(data), data


@pytest.mark.parametrize("size", [0, 1, 128 * 1024, 3 * 1024**2 + 1])
async def test_what_was_put_is_got(store: ArtifactStore, size: int) -> None:
    digest, data = _blob(size)
    assert not await store.has(digest)
    await store.put_bytes(digest, data)
    assert await store.has(digest)
    assert await store.get_bytes(digest) == data


async def test_files_go_in_and_come_out(store: ArtifactStore, tmp_path: Path) -> None:
    digest, data = _blob(1000)
    (tmp_path / "in").write_bytes(data)
    await store.put(tmp_path / "in", digest)
    await store.get(digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in", "out"]


async def test_a_blob_is_stored_once(store: ArtifactStore) -> None:
    digest, data = _blob(5000)
    await asyncio.gather(*(store.put_bytes(digest, data) for _ in range(5)))
    await store.put_bytes(digest, data)
    assert [each.size async for each in store.all() if each.digest == digest] == [5000]


async def test_what_does_not_fit_its_name_is_refused(store: ArtifactStore) -> None:
    digest, data = _blob(100)
    with pytest.raises(HelmrError, match="arrived damaged"):
        await store.put_bytes(digest, data + b"x")
    assert not await store.has(digest)


async def test_what_is_not_there_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    digest, _ = _blob(10)
    with pytest.raises(NotFound, match="no artifact"):
        await store.get_bytes(digest)
    with pytest.raises(NotFound):
        await store.get(digest, tmp_path / "x")
    await store.delete(digest)
    assert not (tmp_path / "x").exists()


async def test_what_was_deleted_is_gone_and_may_come_back(store: ArtifactStore) -> None:
    digest, data = _blob(10_000)
    await store.put_bytes(digest, data)
    await store.delete(digest)
    assert not await store.has(digest)
    assert digest not in [each.digest async for each in store.all()]
    with pytest.raises(NotFound):
        await store.get_bytes(digest)
    await store.put_bytes(digest, data)
    assert await store.get_bytes(digest) == data


async def test_many_blobs_at_the_same_time(store: ArtifactStore) -> None:
    blobs = dict(_blob(20_000) for _ in range(20))
    await asyncio.gather(*(store.put_bytes(digest, data) for digest, data in blobs.items()))
    assert await asyncio.gather(*(store.get_bytes(digest) for digest in blobs)) == list(blobs.values())
    assert set(blobs) <= {each.digest async for each in store.all()}


async def test_a_store_that_works_passes_its_check(store: ArtifactStore) -> None:
    await store.check()


async def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    store = DirectoryArtifacts(tmp_path)
    digest, data = _blob(100)
    await store.put_bytes(digest, data)
    (tmp_path / digest[:2] / digest).write_bytes(data[:-1])
    with pytest.raises(HelmrError, match="damaged in the store"):
        await store.get_bytes(digest)


async def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    digest, data = _blob(10)
    with pytest.raises(HelmrError, match="cannot write below"):
        await DirectoryArtifacts(tmp_path / "file").put_bytes(digest, data)


async def test_a_large_file_goes_to_s3_in_parts_and_comes_back_in_steps(s3: S3Service, tmp_path: Path) -> None:
    store = S3Artifacts(s3.place("large"))
    digest, data = _blob(20 * 1024**2 + 7)
    (tmp_path / "in").write_bytes(data)
    await store.put(tmp_path / "in", digest)
    await store.get(digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    with pytest.raises(HelmrError, match="arrived damaged"):
        await store.put(tmp_path / "in", digest_of(b"something else"))


async def test_a_damaged_object_is_noticed(s3: S3Service, tmp_path: Path) -> None:
    store = S3Artifacts(s3.place("damaged"))
    digest, data = _blob(100)
    await store._write(digest, data[:-1])
    with pytest.raises(HelmrError, match="damaged in the store"):
        await store.get_bytes(digest)
    with pytest.raises(HelmrError, match="damaged in the store"):
        await store.get(digest, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


async def test_what_others_keep_in_the_bucket_is_left_alone(s3: S3Service) -> None:
    store, beside = S3Artifacts(s3.place("shared")), S3Artifacts(s3.place("shared-with-others"))
    digest, data = _blob(10)
    await store.put_bytes(digest, data)
    await store._write("a-file-of-somebody", b"mine")
    await beside.put_bytes(*_blob(10))
    assert [each.digest async for each in store.all()] == [digest]


async def test_more_blobs_than_a_page_has_are_all_listed(s3: S3Service) -> None:
    store = S3Artifacts(s3.place("pages"))
    blobs = {f"{number:064x}" for number in range(30)}
    await asyncio.gather(*(store._write(digest, b"x") for digest in blobs))
    assert {each.digest async for each in store._listed(chunk=7)} == blobs


async def test_a_bucket_that_is_missing_is_named(s3: S3Service) -> None:
    store = S3Artifacts(s3.place(bucket="nowhere"))
    digest, data = _blob(10)
    with pytest.raises(ConfigError, match="there is no bucket nowhere at http"):
        await store.check()
    with pytest.raises(ConfigError, match="there is no bucket"):
        await store.put_bytes(digest, data)
    with pytest.raises(ConfigError, match="there is no bucket"):
        await store.get_bytes(digest)


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
async def test_wrong_credentials_are_an_error_that_does_not_show_them(
    s3: S3Service, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "quite-wrong")
    store = S3Artifacts(s3.place())
    for attempt in (store.check(), store.put_bytes(*_blob(10)), store.get_bytes("0" * 64)):
        with pytest.raises(NotAllowed, match="is refused") as caught:
            await attempt
        assert "quite-wrong" not in f"{caught.value.message} {caught.value.hint}"
        assert s3.secret not in f"{caught.value.message} {caught.value.hint}"


async def test_a_service_without_credentials_is_not_asked(s3: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # no machine of a cloud
    with pytest.raises(NotAllowed, match="there are no credentials"):
        await S3Artifacts(s3.place(), retries=0.5).check()


class _Refusing(Proxy):
    """A proxy that tells when it has refused a connection."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.refuse = True
        self.refused = asyncio.Event()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await super()._accept(reader, writer)
        self.refused.set()


async def test_a_service_that_is_away_is_asked_again_and_then_told_of(s3: S3Service) -> None:
    proxy = _Refusing(int(s3.endpoint.rpartition(":")[2]))
    await proxy.start()
    place = s3.place("away", endpoint=f"http://127.0.0.1:{proxy.port}")
    digest, data = _blob(10)
    try:
        with pytest.raises(Unavailable, match="does not answer"):
            await S3Artifacts(place, retries=0.2).put_bytes(digest, data)
        proxy.refused.clear()
        storing = asyncio.create_task(S3Artifacts(place).put_bytes(digest, data))
        await proxy.refused.wait()
        proxy.refuse = False
        await storing
    finally:
        await proxy.close()
    assert await S3Artifacts(s3.place("away")).get_bytes(digest) == data
