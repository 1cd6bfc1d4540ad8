"""Capturing and restoring versions of workspaces: a folder on one side, the artifact store on the other.

The thread that reads and packs is never more than a few packs ahead of the store. A version exists when its manifest is
stored, and the manifest is stored last; what was stored for one that was never finished is collected as garbage.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from bus import manifest as manifests
from bus import tree
from bus.artifacts import ArtifactStore, digest_of
from bus.manifest import EMPTY, Manifest
from bus.packs import Pack, PackMaker, Snapshot, is_same
from bus.restore import Restoration
from helmr.errors import HelmrError
from helmr.events import VersionFacts

#: Packs on their way to or from the store at the same time.
_WINDOW = 4
#: Entries up to which a tree is looked at without a thread: some 0.2 ms.
SMALL = 100


class Captured(msgspec.Struct, frozen=True):
    """A version that was stored."""

    facts: VersionFacts
    snapshot: Snapshot


async def look(root: Path, *, expected: int = 0) -> tree.Seen:
    """What is in a folder; a small one is looked at at once.

    Raises:
        HelmrError: it cannot be read.
    """
    if expected <= SMALL:
        try:
            return tree.look(root, limit=SMALL)
        except tree.TooMany:
            pass
    return await asyncio.to_thread(tree.look, root)


class Versions:
    """Versions in one artifact store."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store

    async def capture(self, root: Path, before: Snapshot) -> Captured | Snapshot:
        """Store what the folder has become since ``before``: a new version, or, if it is the same, fresh stamps alone.

        Raises:
            HelmrError: something in the folder cannot be read, or there is no room for it.
            Unavailable: the store does not answer.
        """
        seen = await look(root, expected=len(before.manifest.entries))
        if is_same(seen, before):
            return before
        maker = PackMaker(root, seen, before)
        await self._store(maker)
        snapshot = maker.snapshot
        if snapshot.manifest.entries == before.manifest.entries:
            return msgspec.structs.replace(before, stamps=snapshot.stamps)
        data = await asyncio.to_thread(manifests.encode, snapshot.manifest)
        digest = digest_of(data)
        await self.store.put_bytes(digest, data)
        made = snapshot.manifest
        facts = VersionFacts(manifest=digest, files=made.files, bytes=made.size, stored=maker.stored + len(data))
        return Captured(facts, snapshot)

    async def _store(self, maker: PackMaker) -> None:
        packs = maker.packs()
        window = asyncio.Semaphore(_WINDOW)

        async def put(pack: Pack) -> None:
            try:
                await self.store.put_bytes(pack.digest, pack.data)
            finally:
                window.release()

        try:
            async with asyncio.TaskGroup() as puts:
                while (pack := await asyncio.to_thread(next, packs, None)) is not None:
                    await window.acquire()
                    puts.create_task(put(pack))
        except ExceptionGroup as group:
            raise _first(group) from group

    async def manifest(self, digest: str) -> Manifest:
        """The manifest of a version.

        Raises:
            NotFound: it is not in the store.
        """
        return await asyncio.to_thread(manifests.decode, await self.store.get_bytes(digest))

    async def restore(self, digest: str | None, root: Path, owner: tuple[int, int] | None) -> Snapshot:
        """Write a version into the empty folder ``root``; None is the version of a workspace that has none: nothing.

        Raises:
            HelmrError: a part of it is damaged, or cannot be written.
            NotFound: a part of it is not in the store.
            Unavailable: the store does not answer.
        """
        if digest is None:
            return Snapshot(manifest=EMPTY)
        manifest = await self.manifest(digest)
        restoration = Restoration(manifest, root, owner)
        window = asyncio.Semaphore(_WINDOW)

        async def fetch(number: int, name: str) -> None:
            async with window:
                pack = await self.store.get_bytes(name)
                await asyncio.to_thread(restoration.fill, number, pack)

        try:
            await asyncio.to_thread(restoration.begin)
            async with asyncio.TaskGroup() as fetches:
                for number, name in restoration.packs():
                    fetches.create_task(fetch(number, name))
            stamps = await asyncio.to_thread(restoration.finish)
        except ExceptionGroup as group:
            raise _first(group) from group
        except OSError as error:
            raise HelmrError(f"a version cannot be written to {root}: {error.strerror}") from error
        return Snapshot(manifest=manifest, stamps=stamps)


def _first(group: ExceptionGroup[Exception]) -> HelmrError:
    """The error that a group of transfers failed with."""
    error = group.exceptions[0]
    if isinstance(error, OSError):
        return HelmrError(f"a version cannot be read or written: {error.strerror}")
    if isinstance(error, HelmrError):
        return error
    raise group
