"""Copies of the database files that queries read, so that no query ever touches the files being written.

A copy is taken by a child process: DuckDB's lock is a POSIX lock, which the projector would lose by opening its own file.
It is cheap because a DuckDB file changes only at a checkpoint: until then its copy is kept (as a hard link), and only the
write-ahead log is copied anew. Writing stops for the copy of the log alone: a few milliseconds, however large the file is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from helmr.errors import Unavailable
from store.home import journal_of

log = logging.getLogger(__name__)

_COPY_TIMEOUT = 60.0
_Fingerprint = tuple[int, int, int]


@dataclass
class Snapshot:
    """A copy of one database, in a folder of its own; removed when it is outdated and nobody reads it."""

    path: Path
    mark: int
    base: _Fingerprint
    taken: float
    users: int = 0
    outdated: bool = False

    def release(self) -> None:
        """Remove the copy if it is of no more use."""
        if self.outdated and not self.users:
            shutil.rmtree(self.path.parent, ignore_errors=True)


@dataclass
class Snapshots:
    """The present copies of the files of a history, one per file."""

    folder: Path
    _present: dict[Path, Snapshot] = field(default_factory=dict)
    _locks: dict[Path, asyncio.Lock] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def use(self, source: Path, *, mark: int, age: float, rest: asyncio.Lock) -> AsyncIterator[Path]:
        """A copy of ``source`` that holds at least what is applied up to ``mark``, or is no older than ``age`` seconds.

        ``rest`` is held while nothing may be written: never for long, unless a checkpoint comes in between.

        Raises:
            Unavailable: the copy failed, e.g. because the disk is full.
        """
        async with self._locks.setdefault(source, asyncio.Lock()):
            present = self._present.get(source)
            if present is None or (present.mark < mark and time.monotonic() - present.taken > age):
                present = await self._renew(source, present, mark, rest)
            present.users += 1
        try:
            yield present.path
        finally:
            present.users -= 1
            present.release()

    async def _renew(self, source: Path, former: Snapshot | None, mark: int, rest: asyncio.Lock) -> Snapshot:
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        path, journal = folder / source.name, journal_of(source)
        try:
            async with rest:
                found = _fingerprint(source)
            if former is not None and former.base == found:
                os.link(former.path, path)
            else:
                await _copy(source, path)
            async with rest:
                base, taken = _fingerprint(source), time.monotonic()
                if base != found:
                    path.unlink()
                    await _copy(source, path)
                if journal.exists():
                    await _copy(journal, folder / journal.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._present[source] = renewed = Snapshot(path, mark, base, taken)
        if former is not None:
            former.outdated = True
            former.release()
        return renewed

    def drop(self, keep: set[Path]) -> None:
        """Remove the copies of files that are not in ``keep``."""
        for source in set(self._present) - keep:
            former = self._present.pop(source)
            former.outdated = True
            former.release()

    def close(self) -> None:
        """Remove all copies."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _fingerprint(path: Path) -> _Fingerprint:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


async def _copy(source: Path, target: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        "cp", "--reflink=auto", source, target, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_COPY_TIMEOUT):
            _, told = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode != 0:
        raise Unavailable(f"cannot copy the history for a query: {told.decode(errors='replace').strip()}")
