"""Copies of the database files: they hold nobody up, and a checkpoint in between does not spoil them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from store import snapshot
from store.snapshot import Snapshots

pytestmark = pytest.mark.anyio


class Files:
    """A database and its write-ahead log, and what was copied of them while writing had to stop."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database, self.journal = folder / "history.db", folder / "history.db.wal"
        self.database.write_bytes(b"one")
        self.journal.write_bytes(b"two")
        self.rest = asyncio.Lock()
        self.snapshots = Snapshots(folder / "snapshots")
        self.copied: list[tuple[str, bool]] = []
        self.checkpoint = False  #: have one come during the next copy
        self._copy = snapshot._copy
        monkeypatch.setattr(snapshot, "_copy", self._noted)

    async def _noted(self, source: Path, target: Path) -> None:
        self.copied.append((source.name, self.rest.locked()))
        await self._copy(source, target)
        if self.checkpoint:
            self.checkpoint = False
            self.database.write_bytes(b"one, two")
            self.journal.unlink()

    async def read(self, mark: int) -> list[bytes]:
        """What a query would read."""
        async with self.snapshots.use(self.database, mark=mark, age=0.0, rest=self.rest) as copy:
            return [path.read_bytes() for path in sorted(copy.parent.iterdir())]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)


async def test_writing_stops_for_the_write_ahead_log_alone(files: Files) -> None:
    assert await files.read(1) == [b"one", b"two"]
    assert files.copied == [("history.db", False), ("history.db.wal", True)]


async def test_a_file_that_has_not_changed_is_not_copied_again(files: Files) -> None:
    await files.read(1)
    files.journal.write_bytes(b"two, three")
    files.copied.clear()
    assert await files.read(2) == [b"one", b"two, three"]
    assert files.copied == [("history.db.wal", True)]


async def test_after_a_checkpoint_in_between_the_file_is_copied_again(files: Files) -> None:
    files.checkpoint = True
    assert await files.read(1) == [b"one, two"]
    assert files.copied == [("history.db", False), ("history.db", True)]
