"""Notices that the server cannot hear this worker, before the server has given its runs to others.

Nobody can tell from here whether the server is away, so that nobody takes anything, or this worker alone is cut off. Which of
the two counts is the operator's choice (``helmr worker --when-cut-off``): going on costs nothing when the server comes back,
and means that a run may be executed in two places for a while when it was given to another host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from nats.aio.client import Client as Nats

from bus import topology
from bus.attention import TICK, Attention

#: Seconds before the others may act in which everything must have ended: a look, and the killing.
_MARGIN = topology.HEARTBEAT / 2


class CutOff:
    """How long the server has not heard of us, in time that we were awake; run :meth:`watch` in a task of its own."""

    def __init__(self, nc: Nats, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._nc = nc
        self._attention = Attention(clock)
        self._heard = 0.0
        self._heard_again = asyncio.Event()

    def now(self) -> float:
        """The time by which :meth:`heard` goes."""
        return self._attention.seconds()

    def heard(self, since: float) -> None:
        """The server has acknowledged what was said after ``since``."""
        self._heard = since
        self._heard_again.set()

    @property
    def due(self) -> bool:
        """Whether others may take what we execute in a moment: sooner when the server sees that our connection is gone."""
        limit = topology.PRESENCE_TTL if self._nc.is_connected else topology.SUSPECT_AFTER
        return self.now() - self._heard > limit - _MARGIN

    async def watch(self, end: Callable[[], None]) -> None:
        """Have everything ended whenever that is due, for ever; what begins before the server has heard of us again is left."""
        while True:
            if self.due:
                end()
                self._heard_again.clear()
                await self._heard_again.wait()
            await asyncio.sleep(TICK / 2)
