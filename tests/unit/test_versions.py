"""Versions of a folder: captured, changed, restored, and what a hostile or damaged one leads to."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import manifest as manifests
from bus import packs, restore, tree
from bus.artifacts import DirectoryArtifacts
from bus.manifest import CHUNK, Entry, Manifest, Place
from bus.packs import Snapshot
from bus.versions import Captured, Versions
from helmr.errors import HelmrError, NotFound, UsageError
from tests.unit.trees import describe, make_tree

pytestmark = pytest.mark.anyio


class Bench:
    """A folder, a store, and what was captured last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.root.mkdir()
        self.store = DirectoryArtifacts(folder / "store")
        self.versions = Versions(self.store)
        self.snapshot = Snapshot()
        self._copies = 0

    async def capture(self) -> Captured | None:
        """The new version, if there is one."""
        outcome = await self.versions.capture(self.root, self.snapshot)
        self.snapshot = outcome.snapshot if isinstance(outcome, Captured) else outcome
        return outcome if isinstance(outcome, Captured) else None

    async def version(self) -> Captured:
        """The new version."""
        captured = await self.capture()
        assert captured is not None
        return captured

    async def restored(self, captured: Captured) -> Path:
        """A fresh copy of a version."""
        self._copies += 1
        copy = self.folder / f"copy{self._copies}"
        copy.mkdir()
        await self.versions.restore(captured.facts.manifest, copy, None)
        return copy

    def settle(self) -> None:
        """Let every file look as if it had not been touched for a while."""
        self.snapshot = msgspec.structs.replace(self.snapshot, stamps=self._stamps())

    def _stamps(self) -> dict[bytes, tree.Stamp]:
        found = {}
        for path in self.snapshot.stamps:
            status = (self.root / os.fsdecode(path)).lstat()
            found[path] = tree.Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return found

    def stored(self) -> int:
        """Bytes in the store."""
        return sum(path.stat().st_size for path in (self.folder / "store").rglob("*") if path.is_file())


def _entry(manifest: Manifest, path: bytes) -> Entry:
    return next(entry for entry in manifest.entries if entry.path == path)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A folder of which no file counts as just changed, or every second look would read it again."""
    monkeypatch.setattr(tree, "_RACY", -(10**12))
    return Bench(tmp_path)


async def test_what_is_restored_is_what_was_captured(bench: Bench) -> None:
    make_tree(bench.root)
    captured = await bench.version()
    copy = await bench.restored(captured)
    assert describe(copy) == describe(bench.root)
    assert captured.facts.files == 8
    assert (copy / "sparse").stat().st_blocks * 512 < 9 * 1024**2


async def test_a_folder_that_has_not_changed_makes_no_version(bench: Bench) -> None:
    assert await bench.capture() is None
    make_tree(bench.root)
    await bench.version()
    before = bench.stored()
    assert await bench.capture() is None
    assert bench.stored() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a.txt").write_text("HELLO\n"),
        lambda root: (root / "a.txt").chmod(0o600),
        lambda root: (root / "a.txt").unlink(),
        lambda root: (root / "a.txt").rename(root / "b.txt"),
        lambda root: (root / "empty").rmdir(),
        lambda root: (root / "empty").chmod(0o700),
        lambda root: (root / "new").mkdir(),
        lambda root: (root / "link").unlink(),
        lambda root: [(root / "link").unlink(), (root / "link").symlink_to("nothing")],
        lambda root: [(root / "nothing").unlink(), (root / "nothing").mkdir()],
        lambda root: os.utime(root / "a.txt", ns=(5, 5)),
    ],
)
async def test_every_change_makes_a_version(bench: Bench, change: Any) -> None:
    make_tree(bench.root)
    first = await bench.version()
    old = describe(bench.root)
    change(bench.root)
    second = await bench.version()
    assert describe(await bench.restored(second)) == describe(bench.root)
    assert describe(await bench.restored(first)) == old


async def test_a_change_that_hides_behind_its_old_time_is_seen(bench: Bench) -> None:
    make_tree(bench.root)
    await bench.version()
    path = bench.root / "a.txt"
    status = path.stat()
    path.write_text("HELLO\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _entry((await bench.version()).snapshot.manifest, b"a.txt").mtime_ns == status.st_mtime_ns


async def test_only_what_is_new_is_stored(bench: Bench) -> None:
    blob = os.urandom(3 * CHUNK + 5)
    (bench.root / "large").write_bytes(blob)
    (bench.root / "twin").write_bytes(blob)
    first = await bench.version()
    assert len(blob) < first.facts.stored < len(blob) * 1.01
    with (bench.root / "large").open("r+b") as file:
        file.seek(CHUNK + 7)
        file.write(b"x")
    second = await bench.version()
    assert CHUNK < second.facts.stored < CHUNK * 1.01
    assert describe(await bench.restored(second)) == describe(bench.root)
    (bench.root / "large").unlink()
    assert (await bench.version()).facts.stored < 1000


async def test_packs_hold_many_files_and_none_that_nobody_needs(bench: Bench) -> None:
    for number in range(300):
        (bench.root / f"{number}").write_bytes(os.urandom(100))
    first = await bench.version()
    assert len(first.snapshot.manifest.packs) == 1
    for number in range(300):
        (bench.root / f"{number}").write_bytes(os.urandom(100))
    second = await bench.version()
    assert len(second.snapshot.manifest.packs) == 1
    assert second.snapshot.manifest.packs != first.snapshot.manifest.packs


async def test_a_file_that_is_written_to_meanwhile_is_looked_at_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.root / "log").write_bytes(b"a" * 1000)
    read = packs._read_chunk

    def slowly(file: Any, length: int) -> bytes:
        data = read(file, length)
        with (bench.root / "log").open("ab") as other:
            other.write(b"b")
        return data

    monkeypatch.setattr(packs, "_read_chunk", slowly)
    await bench.version()
    assert bench.snapshot.stamps[b"log"] == tree.NEVER
    monkeypatch.undo()
    await bench.version()
    assert _entry(bench.snapshot.manifest, b"log").size == (bench.root / "log").stat().st_size


async def test_a_tree_that_changes_all_the_time_never_breaks_a_capture(bench: Bench) -> None:
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            path = bench.root / f"f{number % 7}"
            path.write_bytes(os.urandom(200))
            (bench.root / "sub").mkdir(exist_ok=True)
            path.rename(bench.root / "sub" / path.name)
            if number % 5 == 0:
                (bench.root / "sub" / path.name).unlink()
                (bench.root / "sub" / path.name).symlink_to("/etc/passwd")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            captured = await bench.capture()
            if captured is not None:
                await bench.restored(captured)
    finally:
        stop.set()
        thread.join()


# What was tampered with


def _manifest(*entries: Entry, **changes: Any) -> Manifest:
    return Manifest(entries=entries, **changes)


@pytest.mark.parametrize(
    "paths",
    [["../x"], ["/etc/x"], ["a/../../x"], ["a", "a/b"], ["."], [""], ["x/"], ["x\0y"], ["a", "a"], ["missing/x"]],
)
def test_paths_that_lead_out_are_refused(paths: list[str]) -> None:
    manifest = _manifest(*(Entry(path.encode(), "file") for path in paths))
    with pytest.raises(UsageError, match="impossible path"):
        manifests.decode(manifests.encode(manifest))


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    manifest = _manifest(Entry(b"out", "link", target=b"/tmp"), Entry(b"out/x", "file"))
    with pytest.raises(UsageError, match="impossible path"):
        restore.Restoration(manifest, tmp_path, None)


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", manifests.encode(Manifest())[:-2], manifests.encode(Manifest(format=9))]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(HelmrError):
        manifests.decode(data)


async def test_damage_is_found_before_anything_of_it_is_used(bench: Bench) -> None:
    (bench.root / "a").write_bytes(os.urandom(1000))
    captured = await bench.version()
    (pack,) = captured.snapshot.manifest.packs
    path = bench.store._path(pack)
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(HelmrError, match="is damaged"):
        await bench.restored(captured)
    path.unlink()
    with pytest.raises(NotFound, match="no artifact"):
        await bench.restored(captured)


def test_a_chunk_is_what_its_name_says(tmp_path: Path) -> None:
    del tmp_path
    import zstandard

    data = zstandard.ZstdCompressor().compress(b"something")
    with pytest.raises(HelmrError, match="is damaged"):
        restore.chunk_of(data, Place(0, 0, len(data)), b"\0" * 32, zstandard.ZstdDecompressor())


def test_a_chunk_without_a_place_is_refused(tmp_path: Path) -> None:
    manifest = _manifest(Entry(b"a", "file", size=1, chunks=(b"x" * 32,)))
    with pytest.raises(HelmrError, match="does not say where"):
        restore.Restoration(manifest, tmp_path, None)


async def test_a_file_that_claims_to_be_endless_is_refused(bench: Bench) -> None:
    with (bench.root / "endless").open("wb") as file:
        os.truncate(file.fileno(), packs.MAX_FILE + 1)
    with pytest.raises(HelmrError, match="exceeds the limit"):
        await bench.capture()


_CONTENT = st.binary(max_size=64).map(lambda data: data * 3) | st.just(b"\0" * 5000)
_NAMES = st.sampled_from(["a", "b", "d/a", "d/b", "d/e/a"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(_NAMES, _CONTENT, max_size=5), min_size=1, max_size=4))
def test_every_version_in_a_row_is_restored_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, bytes]]
) -> None:
    import asyncio
    import shutil

    async def live() -> None:
        bench = Bench(tmp_path_factory.mktemp("row"))
        seen = []
        for state in states:
            for path in bench.root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name, content in state.items():
                (bench.root / name).parent.mkdir(parents=True, exist_ok=True)
                (bench.root / name).write_bytes(content)
            captured = await bench.capture()
            if captured is not None:
                seen.append((captured, describe(bench.root)))
        for captured, then in seen:
            assert describe(await bench.restored(captured)) == then

    asyncio.run(live())
