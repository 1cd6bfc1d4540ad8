"""The worker: one process that takes runs from its lanes and executes them, from its first announcement to its good-bye.

Its identity is new at every start, so that nobody takes it for the one that died. What it does all the time is done by others:
this puts them together, and begins and ends them in the order that loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from pathlib import Path

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats

from bus import topology
from bus.artifacts import open_artifacts
from bus.deployments import Deployments
from bus.insistence import insist
from bus.log import Log
from bus.presence import Presence, WorkerInfo
from bus.queueing import DEFAULT_GROUP
from bus.s3_place import Place
from bus.setup import ensure_topology
from bus.values import Values
from bus.versions import Versions
from helmr import events, ids
from helmr.errors import HelmrError
from helmr.version import __version__
from worker.announcements import Announcements
from worker.dispatches import Dispatches
from worker.engine import Engine, EngineInfo
from worker.execs import Execs
from worker.executions import Executions
from worker.fitting import Fitting
from worker.heir import Heir
from worker.hot import HotRuns
from worker.intake import Intake
from worker.lanes import Lane, Slots, remove_lane
from worker.lease_watch import LeaseWatch
from worker.leftovers import Leftovers
from worker.liveness import BootLock, Liveness
from worker.machines import Machines
from worker.orders import Orders
from worker.services import Services
from worker.sources import Sources

log = logging.getLogger(__name__)

#: Processes of waiting runs that are kept: so many for each slot, and at least so many.
HOT_PER_SLOT, MIN_HOT = 4, 16


class Worker:
    """One worker process; :meth:`run` is its life."""

    def __init__(
        self,
        nc: Nats,
        engine: Engine,
        info: EngineInfo,
        *,
        home: Path,
        slots: int,
        group: str = DEFAULT_GROUP,
        artifacts: Place = None,
        end_when_cut_off: bool = False,
    ) -> None:
        self.id = ids.new("wrk")
        self.nc = nc
        self.engine = engine
        self.group = group
        self.slots = Slots(slots)
        self._end_when_cut_off = end_when_cut_off
        # However long the server is away: nobody else can take our runs while it is.
        event_log = Log(nc, patience=math.inf)
        self._presence = Presence(nc)
        self._lock = BootLock(home, self.id)
        liveness = Liveness(self._presence, home)
        self._deployments = Deployments(nc, on_current=lambda scope, each: engine.retire(str(scope), each.content_hash))
        self._intake = Intake(home, engine)
        versions = open_artifacts(nc, topology.VERSIONS, artifacts)
        self.machines = Machines(
            event_log,
            engine,
            Sources(open_artifacts(nc, topology.ARTIFACTS, artifacts), home / "sources"),
            liveness,
            Versions(versions),
            fitting=Fitting(self._deployments),
            worker_id=self.id,
            host=info.host,
            isolated=info.isolated,
            group=group,
        )
        self._hot = HotRuns(self.machines, limit=max(HOT_PER_SLOT * slots, MIN_HOT))
        self._heir = Heir(event_log, self._deployments, self.machines, self._hot, worker_id=self.id)
        self.execs = Execs(event_log, self._deployments, self.machines, worker_id=self.id)
        services = Services(
            log=event_log,
            deployments=self._deployments,
            machines=self.machines,
            hot=self._hot,
            values=Values(versions),
            engine_lost=self._intake.lose_engine,
        )
        self.executions = Executions(services, liveness, self._intake, worker_id=self.id, group=group)
        self.dispatches = Dispatches(services, liveness, self._intake, self.slots, self.executions, worker_id=self.id)
        self._lease_watch = LeaseWatch(
            event_log, self.dispatches, self.executions, self._hot, self.execs, worker_id=self.id
        )
        self._orders = Orders(nc, self.executions, self.machines, self._hot, self.execs, worker_id=self.id)
        self._leftovers = Leftovers(
            engine, liveness, self.machines, worker_id=self.id, engine_lost=self._intake.lose_engine
        )
        self._announcements = Announcements(
            nc, self._presence, self._about(info), self._intake, running=lambda: len(self.executions)
        )
        names = (group, f"~{info.host}", f"@{self.id}")
        self._lanes = [Lane(nc, name, self.slots, self._intake.gate, self.dispatches.take) for name in names]
        self._pulls: list[asyncio.Task[None]] = []

    def _about(self, info: EngineInfo) -> WorkerInfo:
        return WorkerInfo(
            id=self.id,
            host=info.host,
            group=self.group,
            engine=info.name,
            isolated=info.isolated,
            slots=self.slots.total,
            running=0,
            started_at=events.now(),
            version=__version__,
        )

    async def run(
        self,
        stop: asyncio.Event,
        ready: asyncio.Event | None = None,
        *,
        drain: float = 0.0,
        hurry: asyncio.Event | None = None,
    ) -> None:
        """Work until ``stop`` is set; then take nothing new, and stop every machine when the work is done.

        What has not ended ``drain`` seconds later, or when ``hurry`` is set, is handed back.
        """
        async with asyncio.TaskGroup() as tasks:
            background = await self._start(tasks)
            if ready is not None:
                ready.set()
            await stop.wait()
            await self._drain(drain, hurry or asyncio.Event())
            await self._shut_down()
            for task in background:
                task.cancel()
            await self._say_goodbye()

    async def _start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        await insist(partial(ensure_topology, self.nc))
        background = [
            tasks.create_task(self._presence.watch()),
            tasks.create_task(self._deployments.watch()),
            tasks.create_task(self.machines.stop_idle()),
            tasks.create_task(self._hot.watch()),
        ]
        await asyncio.gather(self._presence.ready.wait(), self._deployments.ready.wait())
        await insist(self._announcements.open)
        await self._orders.hear_news()
        background.append(tasks.create_task(self._announcements.beat()))
        await self._leftovers.inherit(self._heir, self.dispatches.carry_on)
        await self._leftovers.remove()
        await self._orders.hear_orders()
        for lane in self._lanes:
            await insist(lane.create)
        self._pulls = [tasks.create_task(lane.run()) for lane in self._lanes]
        background.append(tasks.create_task(self._lease_watch.watch()))
        background.append(tasks.create_task(self._leftovers.sweep()))
        background.append(
            tasks.create_task(self._intake.mind_engine(announce=self._announcements.say, clean_up=self._leftovers.look))
        )
        if self._end_when_cut_off:
            cut_off = self._announcements.cut_off
            background.append(tasks.create_task(cut_off.watch(self.executions.end_cut_off)))
        self._intake.begin()
        return background

    async def _drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Take nothing any more, and give what is being executed the time to end."""
        self._intake.drain()
        self.execs.refuse()
        await self._hot.close()
        for pull in self._pulls:  # before anything is queued again, or it would come back to us
            pull.cancel()
        await asyncio.wait(self._pulls)
        if seconds <= 0 or self._idle:
            return
        await self._announcements.say()
        await self.machines.stop_unused()  # their next runs are for others
        done = asyncio.create_task(self._wait_idle())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({done, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        hurried.cancel()

    @property
    def _idle(self) -> bool:
        return not self.executions and not self.execs

    async def _wait_idle(self) -> None:
        while not self._idle:
            await self.executions.wait_none()
            await self.execs.wait_none()

    async def _shut_down(self) -> None:
        self.executions.stop()
        await self.executions.wait_none()
        await self.execs.close()
        await self._hot.close()
        await self.machines.close()
        self.executions.machines_gone.set()
        await self.dispatches.wait_none()
        try:
            await self._leftovers.look()  # what cannot be removed now the next worker of this home removes
        finally:
            await self.engine.close()
            self._lock.release()

    async def _say_goodbye(self) -> None:
        try:
            await remove_lane(self.nc, f"@{self.id}")
            await self._announcements.close()
        except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.info("could not say good-bye: %s", error)  # presence expires, and control clears the lane
