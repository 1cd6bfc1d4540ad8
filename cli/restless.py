"""Which files of a project change for ever, so that ``helmr dev`` need not deploy them for ever.

A person's edits come with pauses. A file that has changed again as soon as it was deployed, many times in a row, is written
by a program; perhaps because of the deployment itself, like the output of ``helmr dev`` in the folder that it watches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePosixPath

#: Deployments in a row that a file must have led to.
MANY = 10
#: Seconds between the end of one and the beginning of the next, at most: what is gathered of changes takes a third of it.
_AT_ONCE = 1.0
#: What tasks are made of is never left out: nobody would look for the reason there.
_SOURCE = {".py", ".toml"}


class Restless:
    """What led to each deployment; ``left_out`` are the files whose changes alone shall lead to none any more."""

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self._rows: dict[str, int] = {}
        self._ended = -math.inf

    def begins(self, names: Iterable[str], now: float) -> list[str]:
        """A deployment begins, because these files have changed; returns those that are left out from now on."""
        before = self._rows if now - self._ended <= _AT_ONCE else {}
        self._rows = {name: before.get(name, 0) + 1 for name in names if PurePosixPath(name).suffix not in _SOURCE}
        found = sorted(name for name, row in self._rows.items() if row >= MANY and name not in self.left_out)
        self.left_out |= {*found}
        return found

    def ends(self, now: float) -> None:
        """It has ended, one way or the other."""
        self._ended = now
