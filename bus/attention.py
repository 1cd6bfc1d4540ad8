"""Time as far as this process was there for it: what judges others by their silence must not count its own absence.

A process that was stopped, or whose machine slept, wakes up with a clock that has moved on and a mailbox it has not read. By
that clock everybody else has been silent for all that time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

#: Seconds between looks at the clock, and the most that one look may add.
TICK = 0.5
MAX_STEP = 2 * TICK


class Attention:
    """Seconds of being awake; run :meth:`keep` in a task of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._total = 0.0

    def seconds(self, *, listening: bool = True) -> float:
        """Time spent awake so far; what passed since the last look counts only while ``listening``, and not beyond a step."""
        now = self._clock()
        if listening:
            self._total += min(max(now - self._looked, 0.0), MAX_STEP)
        self._looked = now
        return self._total

    async def keep(self, look: Callable[[], object] | None = None) -> None:
        """Look at the clock for ever."""
        while True:
            (look or self.seconds)()
            await asyncio.sleep(TICK)
