"""How long each step took from the lease of a run to its task's own code, for whoever asks where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stages:
    """A stop watch that is told the name of each step when it is over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def over(self, name: str) -> None:
        """The step called ``name`` has just ended, and the next one begins."""
        now = self._clock()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Seconds by step, in the order they ended; to the microsecond."""
        return {name: round(seconds, 6) for name, seconds in self._seconds.items()}
