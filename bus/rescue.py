"""Takes runs from workers that are gone, and queues them anew, without waiting for another worker to ask.

Who is gone is decided by :mod:`bus.presence`; what they held is known from the live runs. Each look compares the two as they
are, so that it does not matter what was missed before: a control that has just started finds what one that died has left.
Several may do the same at once, and a worker may come back in the middle of it: the compare-and-set append decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from datetime import timedelta
from typing import Literal

import nats.errors
import nats.js.errors

from bus import topology
from bus.host_rescue import HostRescue
from bus.leases import lose_lease
from bus.live import LiveRun, LiveRuns
from bus.log import Log
from bus.presence import Presence, withdraw
from bus.queueing import DEFAULT_GROUP, lane_of, redispatch
from bus.requests import api
from helmr import events, subjects
from helmr.errors import Conflict, HelmrError, NotFound

log = logging.getLogger(__name__)

Pinged = Literal["there", "silent", "cut off"]

#: Runs that are rescued at the same time: living ones must not wait behind a thousand of them.
_AT_ONCE = 16
#: Seconds that a worker gets to answer when it is asked whether it is there.
_PATIENCE = 1.0
#: Seconds by which a timer may be early.
_MARGIN = 0.02
_WORKER_LANE = topology.lane_consumer_name("@")


class Rescue:
    """The rescue service of one control process; run :meth:`run` in a task of its own."""

    def __init__(self, event_log: Log, presence: Presence, live: LiveRuns) -> None:
        self.log = event_log
        self.nc = event_log.nc
        self.presence = presence
        self.live = live
        self._hosts = HostRescue(event_log, presence, live, self._move)

    async def run(self, live_ready: asyncio.Event) -> None:
        """Rescue for ever, from when the live runs are known."""
        await live_ready.wait()
        while True:
            await self._until_something_may_have_changed()
            try:
                await self._ask_the_silent()
                if self.presence.settled:
                    await self._look()
                    await _gather(map(self._move, self._forsaken()))
                    await self._hosts.look()
            except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.info("rescue: %s: %s", type(error).__name__, error)
                self.presence.forgive()

    async def _until_something_may_have_changed(self) -> None:
        """Until a worker says good-bye, or the moment at which the next one has been silent for too long."""
        limits = (topology.SUSPECT_AFTER, topology.PRESENCE_TTL)
        silences = self.presence.silences().values()
        waits = [limit - silence + _MARGIN for silence in silences for limit in limits if silence <= limit]
        try:
            async with asyncio.timeout(min([*waits, topology.HEARTBEAT])):
                await self.presence.departed.wait()
        except TimeoutError:
            return
        self.presence.departed.clear()

    async def _ask_the_silent(self) -> None:
        """A worker whose connection is gone as well need not be waited for any longer."""
        for worker_id, silence in self.presence.silences().items():
            suspect = topology.SUSPECT_AFTER < silence <= topology.PRESENCE_TTL
            if suspect and await self._ping(worker_id) == "cut off":
                log.info("%s was silent for %.1f s and has no connection any more", worker_id, silence)
                self.presence.give_up(worker_id)

    async def _ping(self, worker_id: str) -> Pinged:
        """What comes of asking a worker whether it is there; ``cut off``: the server knows of nobody who listens to that."""
        try:
            await self.nc.request(subjects.worker(worker_id, "ping"), timeout=_PATIENCE)
        except nats.errors.NoRespondersError:
            return "cut off"
        except TimeoutError:
            return "silent"
        return "there"

    async def _look(self) -> None:
        """Rescue what is held by workers that are gone, or queued for them."""
        lanes = await self._worker_lanes()
        held = self.live.leased()
        queued = self._queued_for_workers()
        unheard = (held.keys() | queued.keys() | lanes) - self.presence.alive().keys()
        await _gather(self._look_at(each, held.get(each, []), queued.get(each, [])) for each in unheard)

    async def _look_at(self, worker_id: str, held: list[LiveRun], queued: list[LiveRun]) -> None:
        """Rescue what is with a worker that was not heard of for too long, unless it is there after all.

        One whose announcements are held up goes on leasing: it would lease what was taken from it at once, and lose it again,
        until the dispatches of the run are used up.
        """
        if not await self.presence.confirm_gone(worker_id):
            return
        if await self._ping(worker_id) == "there":
            log.info("%s announces itself no longer, and answers: its runs stay with it", worker_id)
        else:
            await self._rescue(worker_id, held, queued)

    async def _worker_lanes(self) -> set[str]:
        """The workers for which there are lanes."""
        answer = await api(self.nc, f"CONSUMER.NAMES.{topology.RUNS}", {"offset": 0})
        names = answer.get("consumers") or []
        return {name.removeprefix(_WORKER_LANE) for name in names if name.startswith(_WORKER_LANE)}

    def _queued_for_workers(self) -> dict[str, list[LiveRun]]:
        """The runs that wait in the lane of one worker, by worker."""
        found: dict[str, list[LiveRun]] = {}
        for run in self.live:
            if run.state.status == "queued" and run.state.dispatch is not None and (run.state.lane or "")[:1] == "@":
                found.setdefault((run.state.lane or "")[1:], []).append(run)
        return found

    def _forsaken(self) -> list[LiveRun]:
        """The runs that somebody has taken from a worker and not queued again: he is gone as well."""
        horizon = events.now() - timedelta(seconds=2 * topology.ACK_WAIT)
        return [run for run in self.live if run.kind == "lease_lost" and run.at < horizon]

    async def _rescue(self, worker_id: str, held: list[LiveRun], queued: list[LiveRun]) -> None:
        log.info("%s is gone: it held %s runs, and %s wait in its lane", worker_id, len(held), len(queued))
        await withdraw(self.nc, worker_id)  # so that everybody knows at once
        await _gather(self._take_back(worker_id, run) for run in held)
        await _gather(self._move(run) for run in queued)
        await api(self.nc, f"CONSUMER.DELETE.{topology.RUNS}.{_WORKER_LANE}{worker_id}", None)

    async def _take_back(self, worker_id: str, run: LiveRun) -> None:
        state = (await lose_lease(self.log, run.scope, run.id, worker_id)).state
        if state.status == "queued" and state.lease is None:
            await self._redispatch(run, state.dispatch)

    async def _move(self, run: LiveRun) -> None:
        await self._redispatch(run, run.state.dispatch)

    async def _redispatch(self, run: LiveRun, dispatch: int | None) -> None:
        alive = set(self.presence.alive())
        lane = await lane_of(self.log, run.scope, run.id, group=DEFAULT_GROUP, alive=alive)
        await redispatch(self.log, run.scope, run.id, dispatch=dispatch, lane=lane)


async def _gather(works: Iterable[Awaitable[None]]) -> None:
    """Do all of it, some at a time; what has become moot meanwhile is passed over."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def in_turn(work: Awaitable[None]) -> None:
        async with turns:
            try:
                await work
            except (Conflict, NotFound) as error:
                log.debug("moot: %s", error)

    await asyncio.gather(*(in_turn(work) for work in works))
