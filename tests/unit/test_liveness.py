"""The marks by which workers of one home know of each other."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from worker import liveness


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """The folder of the marks of a home."""
    folder = tmp_path / "workers"
    folder.mkdir()
    return folder


def _leave(mark: Path, *, days_ago: float) -> Path:
    mark.touch()
    at = mark.stat().st_mtime - days_ago * 86_400
    os.utime(mark, (at, at))
    return mark


def test_only_those_whose_mark_is_locked_live(marks: Path) -> None:
    _leave(marks / "wrk_dead", days_ago=0)
    with (marks / "wrk_alive").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert liveness.living(marks.parent) == {"wrk_alive"}
    assert liveness.living(marks.parent) == set()


def test_old_marks_are_removed_and_new_ones_stay(marks: Path) -> None:
    old, new = _leave(marks / "wrk_old", days_ago=365), _leave(marks / "wrk_new", days_ago=0)
    liveness.living(marks.parent)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_worker_that_ends_meanwhile_is_no_error(marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(marks / "wrk_ending", days_ago=0)

    def remove(path: Path) -> bool:
        path.unlink()
        return False

    monkeypatch.setattr(liveness, "_is_locked", remove)
    assert liveness.living(marks.parent) == set()
