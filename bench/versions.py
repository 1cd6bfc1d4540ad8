"""How long versions take: 10,000 small files and one of 1 GB, captured, captured again with one byte changed, and restored.

``python bench/versions.py [--store nats|DIR] [--files N] [--large BYTES] [FOLDER]``; with ``nats`` an embedded server with
durability strict, as ``helmr dev`` has it. Folder and copy are compared by ``diff -r``, modes, times and links.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bus import topology
from bus.artifacts import ArtifactStore, DirectoryArtifacts, JetStreamArtifacts
from bus.packs import Snapshot
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from bus.versions import Captured, Versions
from helmr.connection import connected


@asynccontextmanager
async def store_of(what: str, folder: Path) -> AsyncIterator[ArtifactStore]:
    """The store to measure with."""
    if what != "nats":
        yield DirectoryArtifacts(Path(what))
        return
    server = EmbeddedServer(folder / "home")
    await server.start()
    try:
        async with connected(server.url, name="bench") as nc:
            await ensure_topology(nc)
            yield JetStreamArtifacts(nc, topology.VERSIONS)
    finally:
        await server.stop()


def fill(root: Path, files: int, large: int) -> None:
    """Small files of 100 B to 20 KB, text-like, in folders of a hundred; one large file that does not compress."""
    for number in range(files):
        path = root / f"d{number // 100}" / f"f{number}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(os.urandom(50 + number % 5000).hex().encode())
    if large:
        with (root / "large").open("wb") as file:
            for _ in range(large // 2**20):
                file.write(os.urandom(2**20))


async def measure(versions: Versions, root: Path, changed: Path, copy: Path) -> None:
    """Print a line for each step."""
    snapshot = Snapshot()

    async def capture(what: str) -> Captured | None:
        nonlocal snapshot
        begin = time.perf_counter()
        outcome = await versions.capture(root, snapshot)
        took = time.perf_counter() - begin
        stored = outcome.facts.stored if isinstance(outcome, Captured) else 0
        snapshot = outcome.snapshot if isinstance(outcome, Captured) else outcome
        print(f"{what:34} {took * 1000:9.1f} ms  {stored / 1e6:9.2f} MB stored")
        return outcome if isinstance(outcome, Captured) else None

    await capture("first capture")
    await asyncio.sleep(0.1)
    await capture("nothing changed")
    await capture("nothing changed")
    with changed.open("r+b") as file:
        file.seek(changed.stat().st_size // 2)
        file.write(b"!")
    last = await capture("one byte changed")
    assert last is not None
    begin = time.perf_counter()
    await versions.restore(last.facts.manifest, copy, None)
    print(f"{'restore':34} {(time.perf_counter() - begin) * 1000:9.1f} ms")


def compare(root: Path, copy: Path) -> None:
    """Fail when anything differs."""
    subprocess.run(["diff", "-r", "--no-dereference", root, copy], check=True)
    listing = "find . ! -path . -printf '%P %y %m %l\\n' | sort; find . -type f -printf '%P %T@\\n' | sort"
    shown = [subprocess.run(["sh", "-c", listing], cwd=each, check=True, capture_output=True) for each in (root, copy)]
    assert shown[0].stdout == shown[1].stdout
    print("diff -r, kinds, modes, links and times: the same")


async def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="nats")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=0)
    parser.add_argument("folder", nargs="?", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        root, copy = folder / "root", folder / "copy"
        root.mkdir()
        copy.mkdir()
        fill(root, given.files, given.large)
        async with store_of(given.store, folder) as store:
            await measure(Versions(store), root, root / "large" if given.large else root / "d0" / "f7", copy)
        compare(root, copy)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
