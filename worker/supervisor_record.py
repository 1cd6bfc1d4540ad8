"""The note beside a supervisor's socket that says which process it is, so that a later worker can end it, and nobody else.

A process id alone would not do: the start time tells the supervisor from a later process of the same number.
"""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import msgspec

from helmr.errors import Unavailable
from helmr.guest import tree

#: Seconds in which a supervisor that is terminated has ended, its processes included; and in which one is gone that was killed.
_GRACE, _KILL_TIME = 5.0, 3.0
_NAME = "supervisor.json"


class SupervisorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor of a machine folder."""

    pid: int
    born: str

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return bool(self.born) and _born(self.pid) == self.born

    def end(self) -> bool:
        """Terminate it, though it may not be our child, at last by force; False if it had ended before.

        Raises:
            Unavailable: it does not end.
        """
        if not self.alive:
            return False
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if select.select([handle], [], [], _GRACE)[0]:
                return True
            tree.kill([self.pid])  # with what is below it, be it stopped or not
            if select.select([handle], [], [], _KILL_TIME)[0]:
                return True
        except ProcessLookupError:
            return True
        finally:
            os.close(handle)
        raise Unavailable(f"the supervisor {self.pid}, left by an earlier worker, does not end")


def note(folder: Path, pid: int) -> None:
    """Write down that the process is the supervisor of a folder.

    Raises:
        OSError: the folder is gone, or the disk is full.
    """
    (folder / _NAME).write_bytes(msgspec.json.encode(SupervisorRecord(pid=pid, born=_born(pid))))


def read(folder: Path) -> SupervisorRecord | None:
    """Which process is the supervisor of a folder; None if nobody has said so."""
    try:
        return msgspec.json.decode((folder / _NAME).read_bytes(), type=SupervisorRecord)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _born(pid: int) -> str:
    """When a process was started, in the kernel's own count; empty if it is gone or the platform does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in {"Z", "X"} else fields[19]
