"""How many requests somebody may make: so many at once, and so many a second after that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

#: Requests of one address, or with one secret: so many at once, and so many a second after that.
BURST, RATE = 60.0, 20.0
#: Names remembered; the one that was quiet for longest is forgotten.
_NAMES = 10_000


class RateLimit:
    """A bucket of requests for each name, such as an address."""

    def __init__(self, now: Callable[[], float], *, burst: float = BURST, rate: float = RATE) -> None:
        self._now = now
        self._burst = burst
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> bool:
        """Whether one more request is fine."""
        now = self._now()
        left, at = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        allowed = left >= 1
        self._buckets[name] = (left - allowed, now)
        if len(self._buckets) > _NAMES:
            self._buckets.popitem(last=False)
        return allowed
