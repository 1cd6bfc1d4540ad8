"""The order in which held runs are admitted: in turns between groups, by rank within a group.

A group is a tenant, so to say: those who share a concurrency key. However many runs one group has waiting, another one's
first run is at most one round away. Within a group the lower rank comes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime

Rank = tuple[float, str]


def rank(queued_at: datetime, priority: int, run_id: str) -> Rank:
    """By arrival, with ``priority`` seconds of head start: who waits long enough overtakes every later arrival."""
    return (queued_at.timestamp() - priority, run_id)


class FairOrder:
    """Runs that wait, by group; groups take turns (round robin: a run costs its group one turn)."""

    def __init__(self) -> None:
        self._ranks: dict[str, tuple[str, Rank]] = {}
        self._turns: OrderedDict[str, list[Rank]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._ranks

    def add(self, run_id: str, group: str, order: Rank) -> None:
        """One more run; a group that had none takes its turn after all the others."""
        if run_id in self._ranks:
            self.remove(run_id)
        self._ranks[run_id] = (group, order)
        heapq.heappush(self._turns.setdefault(group, []), order)

    def remove(self, run_id: str) -> None:
        """Forget a run, if it waits here."""
        found = self._ranks.pop(run_id, None)
        if found is not None:
            self._tidy(found[0])

    def pick(self, fits: Callable[[str], bool]) -> str | None:
        """Take the next run: the first of the first group in turn whose first run ``fits``; None when nobody's does."""
        for group in self._turns:
            run_id = self._turns[group][0][1]
            if fits(run_id):
                self._turns.move_to_end(group)
                self.remove(run_id)
                return run_id
        return None

    def oldest(self) -> Rank | None:
        """The rank of the run that is due first of all, priority counted in."""
        return min((ranks[0] for ranks in self._turns.values()), default=None)

    def ahead(self, run_id: str) -> int:
        """How many of those waiting now are admitted before this one, if all fit."""
        group, order = self._ranks[run_id]
        own = sum(1 for each, other in self._ranks.values() if each == group and other < order)
        turn = list(self._turns).index(group)
        counts = self._counts()
        return own + sum(
            min(count, own + (1 if at < turn else 0))
            for at, (each, count) in enumerate(counts.items())
            if each != group
        )

    def groups(self) -> dict[str, int]:
        """How many runs of each group wait."""
        return self._counts()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def _counts(self) -> dict[str, int]:
        counts = dict.fromkeys(self._turns, 0)
        for group, _ in self._ranks.values():
            counts[group] += 1
        return counts

    def _tidy(self, group: str) -> None:
        """The first of a group's heap is always a run that waits; an empty group has no turn."""
        ranks = self._turns[group]
        while ranks and self._ranks.get(ranks[0][1]) != (group, ranks[0]):
            heapq.heappop(ranks)
        if not ranks:
            del self._turns[group]
