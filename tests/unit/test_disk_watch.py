"""What the files of a workspace take of the disk, as a watcher sees it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker import disk_watch
from worker.disk_watch import overfull, usage

pytestmark = pytest.mark.anyio

MIB = 1024**2


def _write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # some file systems have no blocks for a file before


def test_all_folders_count(tmp_path: Path) -> None:
    _write(tmp_path / "a", MIB)
    _write(tmp_path / "deep/er/b", 2 * MIB)
    assert 3 * MIB <= usage(tmp_path, 10 * MIB) < 4 * MIB


def test_it_stops_counting_when_it_is_too_much(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e"):
        _write(tmp_path / name, MIB)
    assert MIB <= usage(tmp_path, 1000) < 2 * MIB


def test_what_takes_no_room_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path / "file", MIB)
    (tmp_path / "again").hardlink_to(tmp_path / "file")
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(100 * MIB)
    assert usage(tmp_path, 10 * MIB) < 2 * MIB


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    _write(outside / "file", MIB)
    inside.mkdir()
    (inside / "folder").symlink_to(outside)
    (inside / "file").symlink_to(outside / "file")
    (inside / "loop").symlink_to(inside)
    assert usage(inside, 10 * MIB) < MIB


def test_a_folder_that_is_not_there_takes_nothing(tmp_path: Path) -> None:
    assert usage(tmp_path / "gone", MIB) == 0


async def test_the_watcher_returns_when_it_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_watch, "PAUSE", 0.0)
    looks = iter([10, 99, 100, 101])
    monkeypatch.setattr(disk_watch, "usage", lambda *_: next(looks))
    assert await overfull(tmp_path, 100) == 101
