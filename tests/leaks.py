"""Finds what a test left behind: child processes, and folders in the temporary directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: Seconds that processes which are ending get to be gone.
_PATIENCE = 5.0


def descendants(*, spare: str = "", root: int | None = None) -> dict[int, str]:
    """The living processes below ``root`` (this one), each with its command line.

    Not those with ``spare`` in it, nor theirs.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = [root or os.getpid()]
    while waiting:
        for child in children.get(waiting.pop(), []):
            command = _command(child)
            if not spare or spare not in command:
                found[child] = command
                waiting.append(child)
    return found


def _parent(entry: Path) -> int | None:
    """The parent of a process; None when it is gone, or a zombie."""
    try:
        state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(parent)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(gone)"


def left_running(before: dict[int, str], *, spare: str = "", patience: float = _PATIENCE) -> dict[int, str]:
    """Processes that were not there ``before`` and do not end; ``spare`` as for :func:`descendants`."""
    deadline = time.monotonic() + patience
    while True:
        left = {pid: command for pid, command in descendants(spare=spare).items() if pid not in before}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)
