"""Watches what the files of a workspace take of the disk while a run executes in it: most file systems set folders no limit.

A soft wall: what is written between two looks is noticed at the next one. A look costs some 3 µs a file, and large trees are
looked at less often, which keeps the cost at two hundredths of a processor at most.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

#: Seconds between looks, at least; and how many times longer than a look the pause after it is.
PAUSE = 2.0
_PATIENCE = 50.0
#: Bytes of a block in ``st_blocks``, whatever the file system's own are (POSIX, ``sys/stat.h``).
_BLOCK = 512


async def overfull(root: Path, limit: int) -> int:
    """Return when the files below ``root`` take more than ``limit`` bytes of the disk: how many they take at least."""
    pause = PAUSE
    while True:
        await asyncio.sleep(pause)  # nothing tells us what a task writes
        begun = time.monotonic()
        used = await asyncio.to_thread(usage, root, limit)
        if used > limit:
            return used
        pause = max(PAUSE, _PATIENCE * (time.monotonic() - begun))


def usage(root: Path, limit: int) -> int:
    """Bytes that the files below a folder take of the disk, or as many as there are found when it is more than ``limit``.

    Holes of sparse files take nothing, and a file of several names counts once. What this user may not read is not counted,
    nor are files that have no name any more.
    """
    used = 0
    linked: set[tuple[int, int]] = set()
    try:
        # By descriptors: nothing outside is ever looked at.
        for _, _, names, folder in os.fwalk(root, follow_symlinks=False):
            for name in names:
                used += _size(name, folder, linked)
            if used > limit:
                break
    except OSError:
        return used  # the task has changed the tree under our feet; the next look sees it as it is then
    return used


def _size(name: str, folder: int, linked: set[tuple[int, int]]) -> int:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return 0
    if found.st_nlink > 1:
        if (found.st_dev, found.st_ino) in linked:
            return 0
        linked.add((found.st_dev, found.st_ino))
    return found.st_blocks * _BLOCK
