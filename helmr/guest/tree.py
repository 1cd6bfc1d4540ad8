"""Process trees: who belongs to one, and how to end it whatever it does.

A tree's root is a subreaper, so a descendant cannot leave by double fork or ``setsid``: when its parent dies it becomes a child
of the root. Hence "the root has no children" means "nothing is left".
"""

from __future__ import annotations

import os
import signal
import sys
from functools import cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
#: Links of a folder ``/proc/PID/task`` with one folder in it.
_ONE_THREAD = 3
#: How often newcomers are looked for before what was found is killed anyway; a fork bomb must not keep us looking.
_SWEEPS = 20


@cache
def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    if _libc().prctl(option, value, 0, 0, 0) != 0:
        number = sys.modules["ctypes"].get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def become_subreaper() -> None:
    """Adopt the orphans among this process' descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No set-uid program raises the rights of this process or its descendants any more."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def stay_readable() -> None:
    """Let this process open its own ``/proc/self`` after a change of user (the kernel forbids it by default)."""
    _prctl(_PR_SET_DUMPABLE, 1)


def hide() -> None:
    """Let nobody of the same user look into this process, or change what it does."""
    _prctl(_PR_SET_DUMPABLE, 0)


def children(pid: int) -> list[int]:
    """The direct children of a process, zombies included; empty if it is gone."""
    if sys.platform != "linux":
        return _children_by_ps(pid)
    found: list[int] = []
    threads = [str(pid)]
    try:
        if os.stat(f"/proc/{pid}/task").st_nlink != _ONE_THREAD:
            threads = os.listdir(f"/proc/{pid}/task")
        for thread in threads:
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as listing:
                found += map(int, listing.read().split())
    except (FileNotFoundError, ProcessLookupError):
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            return _children_by_parent(pid)
    return found


def _children_by_ps(pid: int) -> list[int]:
    import subprocess

    listing = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def _children_by_parent(pid: int) -> list[int]:
    """The same on a kernel without ``children`` files (gVisor, CONFIG_PROC_CHILDREN off): every process' parent is read."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(name))
    return found


def descendants(roots: list[int]) -> list[int]:
    """Every process below ``roots``, parents first."""
    found: list[int] = []
    for root in roots:
        found += children(root)
    if found:
        found += descendants(found)
    return found


def send(pids: list[int], number: int) -> None:
    """Signal each process that still exists and that we may signal (a set-uid program of another user stays alone)."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def send_group(leader: int | None, number: int) -> None:
    """Signal the process group that ``leader`` leads, if it is there."""
    if leader is None:
        return
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return


def terminate(root: int) -> None:
    """SIGTERM to everything below ``root``; what is stopped is continued, or it could not react."""
    pids = descendants([root])
    send(pids, signal.SIGTERM)
    send(pids, signal.SIGCONT)


def kill(pids: list[int]) -> None:
    """SIGKILL to ``pids`` and everything below them, having stopped all of them first, so that none forks away meanwhile."""
    frozen: set[int] = set()
    for _ in range(_SWEEPS):
        fresh = [pid for pid in [*pids, *descendants(pids)] if pid not in frozen]
        if not fresh:
            break
        send(fresh, signal.SIGSTOP)
        frozen.update(fresh)
    send(list(frozen), signal.SIGKILL)


def exterminate(reap: Callable[[int], bool], spare: Callable[[], set[int]] = set) -> None:
    """Kill everything below this process, except ``spare()`` and what is below that, until nothing else is left.

    ``reap(options)`` waits for children as ``os.waitpid`` does with these options, takes note of them, and returns whether
    any child remains.
    """
    while reap(os.WNOHANG):
        victims = [pid for pid in children(os.getpid()) if pid not in spare()]
        if not victims:
            return
        kill(victims)
        reap(0)
