"""How many runs wait in each lane, and how many more are worth it.

A lane is first in, first out: what is in it knows neither priority nor fairness any more. So no more runs are let into it than
keep its workers busy; the others are held, and let in by turns.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from bus.live import LiveRun
from bus.presence import Presence

#: Runs that may wait in a lane however few slots its workers have.
MIN_BACKLOG = 16
#: Seconds after which a run that was let in and is not heard of is taken for one that never was: its start failed.
_HEARD_WITHIN = 5.0


class LaneLoads:
    """The load of every lane; :meth:`note` is told of every change of a live run."""

    def __init__(self, presence: Presence, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._presence = presence
        self._clock = clock
        self._waiting: Counter[str] = Counter()
        self._sent: dict[str, tuple[str, float]] = {}

    def note(self, before: LiveRun | None, after: LiveRun | None) -> None:
        """Count a run in or out."""
        was = before.in_lane if before else None
        now = after.in_lane if after else None
        if was != now:
            if was is not None:
                self._waiting[was] -= 1
            if now is not None:
                self._waiting[now] += 1
        if self._sent and (run := before or after) is not None:
            self.forget(run.id)

    def send(self, run_id: str, lane: str) -> None:
        """Count a run that is being let into a lane, until its event is heard of."""
        self.forget(run_id)
        self._sent[run_id] = (lane, self._clock())
        self._waiting[lane] += 1

    def forget(self, run_id: str) -> None:
        """The run was let in, as its event tells, or not after all."""
        found = self._sent.pop(run_id, None)
        if found is not None:
            self._waiting[found[0]] -= 1

    def waiting(self, lane: str) -> int:
        """Runs that wait in a lane for a worker."""
        return self._waiting[lane]

    def most(self, lane: str) -> int:
        """Runs that may wait there: twice what its workers execute at a time, but :data:`MIN_BACKLOG` at least."""
        return max(MIN_BACKLOG, 2 * sum(worker.slots for worker in self._presence.workers(lane)))

    def room(self, lane: str) -> int:
        """How many more may be let in; not positive when there are enough."""
        self._give_up()
        return self.most(lane) - self._waiting[lane]

    def _give_up(self) -> None:
        horizon = self._clock() - _HEARD_WITHIN
        while self._sent and (first := next(iter(self._sent.items())))[1][1] < horizon:
            self.forget(first[0])
