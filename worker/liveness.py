"""Which workers are alive: by presence, and for those that share our home folder by the kernel's word.

Each worker holds a lock on a file of its own for as long as it lives, so that its neighbours know of its death at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from pathlib import Path
from typing import IO

from bus.presence import Presence
from worker.host import writing

#: Seconds after which the mark of a dead worker means nothing to anybody any more.
_FORGET_AFTER = 3600.0


class BootLock:
    """Held by a worker from its start to its end, however it ends."""

    def __init__(self, home: Path, worker_id: str) -> None:
        with writing(home):
            folder = _folder(home)
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / worker_id
            self._file: IO[str] = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Say that the worker has ended in good order."""
        self._path.unlink(missing_ok=True)
        self._file.close()


class Liveness:
    """What one worker knows of the others."""

    def __init__(self, presence: Presence, home: Path) -> None:
        self._presence = presence
        self._home = home

    def is_alive(self, worker_id: str) -> bool:
        """Whether a worker may still be at work; when in doubt, it is."""
        return not _known_dead(self._home, worker_id) and self._presence.is_alive(worker_id)

    async def confirm_gone(self, worker_id: str) -> bool:
        """Whether a worker is certainly gone, so that its runs may be taken; see :meth:`Presence.confirm_gone`.

        Raises:
            Unavailable: the server does not answer.
        """
        return _known_dead(self._home, worker_id) or await self._presence.confirm_gone(worker_id)

    def alive(self) -> set[str]:
        """The workers that are heard of and not known to be dead."""
        return {worker for worker in self._presence.alive() if not _known_dead(self._home, worker)}

    def neighbours(self) -> set[str]:
        """The workers of this home that are alive, ourselves included."""
        return living(self._home)


def living(home: Path) -> set[str]:
    """The workers of this home that are alive; marks that dead ones left long ago are removed on the way."""
    found = set()
    folder = _folder(home)
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _is_locked(path):
            found.add(path.name)
        else:
            _forget(path)
    return found


def _forget(mark: Path) -> None:
    """Remove the mark of a dead worker, if it is old. It may be gone: its worker has just ended in good order."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - mark.stat().st_mtime > _FORGET_AFTER:
            mark.unlink()


def _known_dead(home: Path, worker_id: str) -> bool:
    path = _folder(home) / worker_id
    return path.exists() and not _is_locked(path)


def _folder(home: Path) -> Path:
    return home / "workers"


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
