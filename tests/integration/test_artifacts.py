"""What every artifact store promises, whatever keeps its blobs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus import topology
from bus.artifacts import ArtifactStore, DirectoryArtifacts, JetStreamArtifacts, digest_of
from helmr.errors import HelmrError, NotFound
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["jetstream", "directory"])
async def store(request: pytest.FixtureRequest, platform: Platform, tmp_path: Path) -> AsyncIterator[ArtifactStore]:
    if request.param == "directory":
        yield DirectoryArtifacts(tmp_path / "store")
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
