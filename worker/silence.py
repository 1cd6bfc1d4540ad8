"""Ends a machine whose supervisor does not answer any more: its container is paused, say, and what runs in it would never end.

Deadlines, grace and the end of process trees are the supervisor's: that it stands still nobody but the worker can notice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from bus import topology
from helmr.errors import HelmrError

log = logging.getLogger(__name__)

#: Seconds between two questions, and how many may go unanswered: half a minute, in which the busiest machine finds the time.
ASK_EVERY, UNANSWERED = topology.HEARTBEAT, 10


class Asked(Protocol):
    """What is needed of a :class:`worker.channel.Channel`."""

    @property
    def lost(self) -> str:
        """Why the connection ended; empty while it lives."""
        ...

    @property
    def busy(self) -> bool:
        """Whether anything is to be expected of the supervisor."""
        ...

    @property
    def heard(self) -> int:
        """Counts what the supervisor has said."""
        ...

    def ping(self) -> None:
        """Ask for an answer."""
        ...

    def blame(self, reason: str) -> None:
        """Say why the connection will end."""
        ...


async def end_when_silent(
    channel: Asked, end: Callable[[], Awaitable[None]], *, sleep: Callable[[float], Awaitable[float]] | None = None
) -> None:
    """Call ``end``, until it succeeds, once the supervisor has been silent for too long; returns when the connection has ended.

    ``sleep`` sleeps so many seconds and returns how many it were. A silence counts only while we were awake ourselves.
    """
    sleep = sleep or _sleep
    unanswered = 0
    while not channel.lost:
        before = channel.heard
        if channel.busy:
            channel.ping()
        slept = await sleep(ASK_EVERY)
        if channel.heard != before or not channel.busy:
            unanswered = 0
        elif slept < 2 * ASK_EVERY:
            unanswered += 1
        if unanswered >= UNANSWERED and not channel.lost:
            await _end(channel, end)


async def _end(channel: Asked, end: Callable[[], Awaitable[None]]) -> None:
    reason = f"it did not answer for {ASK_EVERY * UNANSWERED:.0f} s"
    log.warning("ending a machine: %s", reason)
    channel.blame(reason)
    try:
        await end()
    except HelmrError as error:
        log.warning("that machine cannot be ended now: %s", error)  # it is tried again


async def _sleep(seconds: float) -> float:
    loop = asyncio.get_running_loop()
    before = loop.time()
    await asyncio.sleep(seconds)
    return loop.time() - before
