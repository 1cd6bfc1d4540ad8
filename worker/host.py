"""The machine that a worker runs on: its identity, which outlives workers, and whether it has room."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from helmr import ids
from helmr.errors import HelmrError

#: Free bytes below which a disk counts as almost full: what is being executed still has to write its files. And those above
#: which it does not any more.
DISK_RESERVE, DISK_RECOVERED = 512 * 1024**2, 640 * 1024**2
#: Part of the machine's memory that must be available for anything to be kept ready.
_MEMORY_RESERVE = 0.1


@contextlib.contextmanager
def writing(home: Path) -> Iterator[None]:
    """Turn what goes wrong with files below ``home`` into an error that says which folder, why, and what to do.

    Raises:
        HelmrError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise HelmrError(
            f"cannot write below {home}: {error.strerror or error}",
            hint="free some space, or set HELMR_HOME to a folder that this user may write to",
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error says, or comes from one that says, that a disk or a quota is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__
    return False


def host_id(home: Path) -> str:
    """The id of this Helmr home on this machine (``host_01jd…``); created by whoever asks first, the same ever after.

    Not the host name: two machines may share one, and one machine may hold two homes with different workspaces.

    Raises:
        HelmrError: ``home`` cannot be read or written.
    """
    with writing(home):
        return _read_or_create(home)


def _read_or_create(home: Path) -> str:
    path = home / "host-id"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        home.mkdir(parents=True, exist_ok=True)
    draft = home / f".host-id.{os.getpid()}.{ids.new('host')}"
    draft.write_text(ids.new("host") + "\n")
    try:
        # A hard link appears whole and never replaces: of two first workers one wins, and both read its id.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_text().strip()


def memory_is_short(meminfo: Path = Path("/proc/meminfo")) -> bool:
    """Whether this machine has little memory left; unknown is no."""
    try:
        facts = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, available = (int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return False
    return available < total * _MEMORY_RESERVE


def disk_is_full(home: Path, *, before: bool) -> bool:
    """Whether the disk that ``home`` is on is almost full, if it was or was not ``before``; unknown is no."""
    try:
        return shutil.disk_usage(home).free < (DISK_RECOVERED if before else DISK_RESERVE)
    except OSError:
        return False
