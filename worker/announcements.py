"""Keeps saying that a worker is there and at work, and what speaks against giving it runs; notices when nobody hears it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus import topology
from bus.presence import Presence, WorkerInfo, announce, withdraw
from helmr import subjects
from helmr.errors import HelmrError
from worker.cut_off import CutOff
from worker.intake import Intake

log = logging.getLogger(__name__)


class Announcements:
    """What one worker says about itself: ``about``, and what changes of that.

    Args:
        presence: the worker's own view of all workers, which must not believe a silence that is the server's.
        running: how many runs it executes.
    """

    def __init__(
        self, nc: Nats, presence: Presence, about: WorkerInfo, intake: Intake, *, running: Callable[[], int]
    ) -> None:
        self._nc = nc
        self._presence = presence
        self._about = about
        self._intake = intake
        self._running = running
        self._beats = 0
        #: Knows how long nobody has heard us.
        self.cut_off = CutOff(nc)

    async def open(self) -> None:
        """Announce ourselves for the first time, and answer control from then on.

        Raises:
            nats.errors.Error, TimeoutError: the server is away.
        """
        await self._intake.mind_disk()
        await announce(self._nc, self._next())
        await self._nc.subscribe(subjects.worker(self._about.id, "ping"), cb=_answer_ping)

    async def beat(self) -> None:
        """Say that we are alive and at work: whatever else the server leaves without an answer must not keep us from that."""
        while True:
            await asyncio.sleep(topology.HEARTBEAT)
            await self._intake.mind_disk()
            await self.say()

    async def say(self) -> None:
        """Announce ourselves; an announcement that was lost with the server is given up in time for the next one."""
        said = self.cut_off.now()
        try:
            async with asyncio.timeout(topology.HEARTBEAT):
                await announce(self._nc, self._next())
            self.cut_off.heard(said)
        except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.warning("presence: %s: %s", type(error).__name__, error)
            self._presence.forgive()

    async def close(self) -> None:
        """Say that we are gone; raises what nats-py raises when the server is away: presence expires then."""
        await withdraw(self._nc, self._about.id)

    def _next(self) -> WorkerInfo:
        self._beats += 1
        return msgspec.structs.replace(
            self._about,
            running=self._running(),
            draining=self._intake.draining,
            full=self._intake.disk_full,
            engine_problem=self._intake.engine_problem,
            beat=self._beats,
        )


async def _answer_ping(msg: Msg) -> None:
    """That we have a connection is all that control wants to know."""
    await msg.respond(b"")
