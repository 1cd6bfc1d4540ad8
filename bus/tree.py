"""Looks at a folder that hostile code may be changing meanwhile: what is in it, and whether it is what was there last time.

Every step goes through a descriptor of its parent folder and follows no symbolic link, so that nothing outside is ever looked
at. Regular files, folders and symbolic links are taken; sockets, pipes and devices are left out.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from bus.manifest import MAX_DEPTH, MAX_ENTRIES, Entry
from helmr.errors import HelmrError

#: Nanoseconds: a file that changed so shortly before it was looked at may change again without a new time stamp.
_RACY = 50_000_000
#: What is kept of a file's mode. Not who it would run as: it may be restored on a machine where its owner is somebody.
FILE_MODE = 0o1777
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """What tells that a file has changed; tasks cannot set ``ctime``."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


#: No file has it: whoever carries it is read again.
NEVER = Stamp(-1, 0, 0, 0)


class Seen(NamedTuple):
    """One look at a tree: entries without content, and the stamps of its files."""

    entries: list[Entry]
    stamps: dict[bytes, Stamp]


class TooMany(HelmrError):
    """The tree has more entries than were to be looked at."""


def look(root: str | bytes | os.PathLike[str], *, limit: int = MAX_ENTRIES) -> Seen:
    """What is in the folder ``root``, which itself is no part of it; nothing if there is no such folder.

    Raises:
        TooMany: more than ``limit`` entries.
        HelmrError: something cannot be read, or folders are nested too deeply.
    """
    seen = Seen([], {})
    horizon = time.time_ns() - _RACY
    try:
        top = os.open(root, _FOLDER)
    except FileNotFoundError:
        return seen
    try:
        for entry, stamp in _walk(top, b"", 0):
            if len(seen.entries) >= limit:
                raise TooMany(f"the workspace has more than {limit} files, folders and links")
            seen.entries.append(entry)
            if stamp is not None:
                seen.stamps[entry.path] = stamp if stamp.ctime_ns < horizon else NEVER
    finally:
        os.close(top)
    seen.entries.sort(key=lambda entry: entry.path.split(b"/"))
    return seen


def _walk(folder: int, prefix: bytes, depth: int) -> Iterator[tuple[Entry, Stamp | None]]:
    if depth >= MAX_DEPTH:
        raise HelmrError(f"the workspace has folders nested more than {MAX_DEPTH} deep: {_shown(prefix)}")
    with os.scandir(folder) as items:
        for item in items:
            path = prefix + os.fsencode(item.name)
            try:
                status = item.stat(follow_symlinks=False)
                kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFREG:
                    stamp = Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                    yield Entry(path, "file", status.st_mode & FILE_MODE, status.st_size, status.st_mtime_ns), stamp
                elif kind == stat.S_IFLNK:
                    target = os.readlink(os.fsencode(item.name), dir_fd=folder)
                    yield Entry(path, "link", target=target), None
                elif kind == stat.S_IFDIR:
                    inner = os.open(item.name, _FOLDER, dir_fd=folder)
                    try:
                        yield Entry(path, "folder", stat.S_IMODE(status.st_mode)), None
                        yield from _walk(inner, path + b"/", depth + 1)
                    finally:
                        os.close(inner)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it has gone, or become something else, since the folder was read
            except OSError as error:
                if error.errno == 40:  # ELOOP: a link has taken its place
                    continue
                raise HelmrError(f"{_shown(path)} in the workspace cannot be read: {error.strerror}") from error


def open_file(root: str | bytes | os.PathLike[str], path: bytes) -> int | None:
    """A descriptor of the regular file at ``path``, None if there is none (any more); no part of the path is a link.

    Raises:
        HelmrError: it may not be read.
    """
    *folders, name = path.split(b"/")
    here = os.open(root, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        # Not blocking: what was a file a moment ago may be a pipe by now.
        found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    except PermissionError as error:
        raise HelmrError(f"{_shown(path)} in the workspace cannot be read: {error.strerror}") from error
    except OSError:
        return None  # gone, or a link, a socket
    finally:
        os.close(here)
    if stat.S_ISREG(os.fstat(found).st_mode):
        return found
    os.close(found)
    return None


def _shown(path: bytes) -> str:
    return path.decode(errors="replace")
