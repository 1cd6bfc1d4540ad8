"""What a run recorded when its code ran before, handed out call by call while the code runs again from the top.

A run that waited for long, or whose worker was lost, is executed again. Each durable call (a wait, a step, a token, a record)
then gets what it got the first time, and nothing happens twice. Calls of the main line, the task function itself, must come in
the order they were recorded in. Calls of other threads and asyncio tasks come in any order: they are known by name and number.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from helmr.errors import Nondeterminism

Entry = dict[str, Any]


class Slot(NamedTuple):
    """One durable call: its key, and what is recorded of it, if anything."""

    kind: str
    name: str
    n: int
    main: bool
    entry: Entry | None

    @property
    def key(self) -> dict[str, Any]:
        """What tells this call from all others of the run."""
        return {"name": self.name, "n": self.n, "main": self.main}


class Journal:
    """The records of one run; ``entries`` have ``kind, name, n, main`` and what the call led to."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._main: deque[Entry] = deque()
        self._aside: dict[tuple[str, str, int], Entry] = {}
        for entry in entries:
            if entry["main"]:
                self._main.append(entry)
            else:
                self._aside[entry["kind"], entry["name"], entry["n"]] = entry
        self._counts: Counter[tuple[str, str, bool]] = Counter()

    @property
    def replaying(self) -> bool:
        """Whether something of the main line is still to be handed out."""
        return bool(self._main)

    def take(self, kind: str, name: str, *, main: bool) -> Slot:
        """The next call of this kind and name.

        Raises:
            Nondeterminism: another call was recorded at this place.
        """
        self._counts[kind, name, main] += 1
        n = self._counts[kind, name, main]
        if not main:
            return Slot(kind, name, n, main, self._aside.pop((kind, name, n), None))
        if not self._main:
            return Slot(kind, name, n, main, None)
        entry = self._main[0]
        if (entry["kind"], entry["name"], entry["n"]) != (kind, name, n):
            raise _mismatch(entry, describe(kind, name, n))
        self._main.popleft()
        return Slot(kind, name, n, main, entry)

    def finish(self) -> None:
        """The function has ended.

        Raises:
            Nondeterminism: more was recorded.
        """
        if self._main:
            raise _mismatch(self._main[0], "the end of the task")


def describe(kind: str, name: str, n: int) -> str:
    """A call, for people."""
    return f"{kind} {name!r}, call {n}" if name else f"{kind}, call {n}"


def _mismatch(entry: Entry, found: str) -> Nondeterminism:
    expected = describe(entry["kind"], entry["name"], entry["n"])
    return Nondeterminism(
        f"the task took another way than the time before: expected {expected}, found {found}",
        hint="what differs from one execution to the next (time, chance, files, the network) belongs into a step",
        details={"expected": expected, "found": found},
    )
