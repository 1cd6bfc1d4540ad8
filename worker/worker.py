"""The worker: takes runs from its lanes, leases them, executes them, and keeps saying that it is alive.

Only the compare-and-set append of ``leased`` makes a run this worker's; an acknowledgement is a hint to the queue and no
authority. Its identity is new at every start, so that nobody takes it for the one that died.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus import topology
from bus.artifacts import open_artifacts
from bus.deployments import Deployments
from bus.leases import spec_of
from bus.log import RUN, Log
from bus.presence import Presence, WorkerInfo, announce, withdraw
from bus.pull import Delivery
from bus.queueing import DEFAULT_GROUP, lane_of, redispatch
from bus.s3_place import Place
from bus.services.execs import ExecOrder, KillRequest
from bus.services.workspaces import StopOrder
from bus.setup import ensure_topology
from bus.values import Values
from bus.versions import Versions
from helmr import events, ids, subjects
from helmr.errors import EngineUnavailable, HelmrError, Unavailable
from helmr.events import RunEvent
from helmr.subjects import Scope
from helmr.version import __version__
from worker.cut_off import CutOff
from worker.engine import Engine, EngineInfo, Inheritance
from worker.execs import Execs
from worker.execution import Execution, HandedBack
from worker.heir import Carried, Heir
from worker.host import disk_is_full
from worker.hot import HotRun, HotRuns
from worker.lanes import Lane, Slots, remove_lane
from worker.leasing import LOOK_AGAIN, Held, Stale, take_lease
from worker.liveness import BootLock, Liveness
from worker.machines import Machines
from worker.run_journal import Fenced
from worker.services import Services
from worker.sources import Sources

log = logging.getLogger(__name__)

#: Seconds between looks at an engine that does not answer.
_ENGINE_RETRY = 2.0
#: Seconds between looks for what dead workers left running.
_SWEEP = 30.0
#: Processes of waiting runs that are kept: so many for each slot, and at least so many.
HOT_PER_SLOT, MIN_HOT = 4, 16
#: Lease checks under way at the same time: they are only a precaution.
_CHECKS = 8
_EVERYWHERE = Scope("*", "*")


class Stopping(Exception):
    """The worker takes nothing any more: somebody else shall."""


class NotNow(Exception):
    """The disk is almost full, or the engine away: somebody else shall, or this worker later."""


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
        self.info = info
        self.group = group
        self.slots = Slots(slots)
        # However long the server is away: nobody else can take our runs while it is.
        self._log = Log(nc, patience=math.inf)
        self._presence = Presence(nc)
        self._cut_off = CutOff(nc)
        self._end_when_cut_off = end_when_cut_off
        self._lock = BootLock(home, self.id)
        self._liveness = Liveness(self._presence, home)
        self._deployments = Deployments(nc, on_current=lambda scope, each: engine.retire(str(scope), each.content_hash))
        self._gate = asyncio.Event()
        self._pulls: list[asyncio.Task[None]] = []
        self._executions: dict[str, Execution] = {}
        self._messages: dict[str, Msg] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()
        self._draining = asyncio.Event()
        self._stopping = asyncio.Event()
        self._machines_gone = asyncio.Event()
        self._engine_lost = asyncio.Event()
        self._engine_problem = ""
        self._home = home
        self._disk_full = False
        #: Dispatch messages settled so far, by what came of them.
        self.dispatches: Counter[str] = Counter()
        self._started_at = events.now()
        self._beats = 0
        versions = open_artifacts(nc, topology.VERSIONS, artifacts)
        self.machines = Machines(
            self._log,
            engine,
            Sources(open_artifacts(nc, topology.ARTIFACTS, artifacts), home / "sources"),
            self._liveness,
            Versions(versions),
            worker_id=self.id,
            host=info.host,
            isolated=info.isolated,
            group=group,
        )
        self._hot = HotRuns(self.machines, limit=max(HOT_PER_SLOT * slots, MIN_HOT))
        self._heir = Heir(self._log, self._deployments, self.machines, self._hot, worker_id=self.id)
        self.execs = Execs(self._log, self._deployments, self.machines, worker_id=self.id, ended=self._progress.set)
        self._services = Services(
            log=self._log,
            deployments=self._deployments,
            machines=self.machines,
            hot=self._hot,
            values=Values(versions),
            engine_lost=self._lose_engine,
        )
        names = (group, f"~{info.host}", f"@{self.id}")
        self._lanes = [Lane(nc, name, self.slots, self._gate, self._take) for name in names]

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
        await ensure_topology(self.nc)
        background = [
            tasks.create_task(self._presence.watch()),
            tasks.create_task(self._deployments.watch()),
            tasks.create_task(self.machines.stop_idle()),
            tasks.create_task(self._hot.watch()),
        ]
        await asyncio.gather(self._presence.ready.wait(), self._deployments.ready.wait())
        await self._mind_disk()
        await announce(self.nc, self._about())
        await self.nc.subscribe(subjects.worker(self.id, "ping"), cb=self._on_ping)
        await self.nc.subscribe(subjects.live(_EVERYWHERE, "run", "*", "cancel_requested"), cb=self._on_cancel)
        await self.nc.subscribe(subjects.live(_EVERYWHERE, "run", "*", "cancelled"), cb=self._on_ended)
        background.append(tasks.create_task(self._beat()))
        await self._inherit()
        await self._remove_leftovers()
        await self.nc.subscribe(subjects.worker(self.id, "stop"), cb=self._on_stop_order)
        await self.nc.subscribe(subjects.worker(self.id, "delete"), cb=self._on_delete_order)
        await self.nc.subscribe(subjects.worker(self.id, "exec"), cb=self._on_exec_order)
        await self.nc.subscribe(subjects.worker(self.id, "exec-kill"), cb=self._on_kill_order)
        for lane in self._lanes:
            await lane.create()
        self._pulls = [tasks.create_task(lane.run()) for lane in self._lanes]
        works = (self._mind_leases, self._mind_engine, self._sweep, self._watch_cut_off)
        background += [tasks.create_task(work()) for work in works]
        self._open_gate()
        return background

    async def _drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Take nothing any more, and give what is being executed the time to end."""
        self._gate.clear()
        self._draining.set()
        self.execs.refuse()
        await self._hot.close()
        for pull in self._pulls:  # before anything is queued again, or it would come back to us
            pull.cancel()
        await asyncio.wait(self._pulls)
        if seconds <= 0 or self._idle:
            return
        await self._announce()
        await self.machines.stop_unused()  # their next runs are for others
        done = asyncio.create_task(self._until(lambda: self._idle))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({done, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        hurried.cancel()

    async def _shut_down(self) -> None:
        self._stopping.set()
        for execution in list(self._executions.values()):
            execution.stop(HandedBack("the worker was stopped"))
        await self._until(lambda: not self._executions)
        await self.execs.close()
        await self._hot.close()
        await self.machines.close()
        self._machines_gone.set()
        await self._until(lambda: not self._handlers)
        try:
            await self._look_for_leftovers()  # what cannot be removed now the next worker of this home removes
        finally:
            await self.engine.close()
            self._lock.release()

    async def _say_goodbye(self) -> None:
        try:
            await remove_lane(self.nc, f"@{self.id}")
            await withdraw(self.nc, self.id)
        except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.info("could not say good-bye: %s", error)  # presence expires, and control clears the lane

    @property
    def _idle(self) -> bool:
        return not self._executions and not self.execs

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress.clear()
            await self._progress.wait()

    def _about(self) -> WorkerInfo:
        """The next announcement."""
        self._beats += 1
        return WorkerInfo(
            id=self.id,
            host=self.info.host,
            group=self.group,
            engine=self.info.name,
            isolated=self.info.isolated,
            slots=self.slots.total,
            running=len(self._executions),
            started_at=self._started_at,
            version=__version__,
            draining=self._draining.is_set(),
            full=self._disk_full,
            engine_problem=self._engine_problem,
            beat=self._beats,
        )

    def executing(self) -> Counter[tuple[str, ...]]:
        """How many runs are being executed, by project, environment and task."""
        return Counter((*each.scope, each.spec.task_id) for each in self._executions.values())

    async def _inherit(self) -> None:
        """Take over what dead workers of this home left alive."""
        left = await self.engine.inherit(self.id, self._liveness.neighbours())
        await asyncio.gather(*map(self._inherit_one, left))

    async def _inherit_one(self, found: Inheritance) -> None:
        async with self.machines.inherit(found) as scope:
            if scope is None:
                return
            log.info("workspace %s is taken over from %s", found.machine.workspace_id, found.former)
            for carried in await self._heir.take(scope, found):
                self._see_to(self._carry_on(carried))

    async def _remove_leftovers(self, *, spare_running: bool = False) -> None:
        """Remove what dead workers of this home left running."""
        for ref in await self.engine.collect(self._liveness.neighbours(), spare_running=spare_running):
            log.info("removed %s, left by a worker that is gone", ref)

    def _take(self, item: Delivery) -> None:
        self.slots.claim()
        self._see_to(self._handle(item))

    def _see_to(self, handling: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(handling)
        self._handlers.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._handlers.discard(task)
        self._progress.set()

    async def _handle(self, item: Delivery) -> None:
        """See the run of one dispatch message to its end, and settle the message."""
        self._messages[item.msg.reply] = item.msg
        entered = False
        result = "failed"
        try:
            await self.slots.enter()
            entered = True
            await self._serve(item)
        except Stale:
            result = "stale"
            await item.msg.ack()
        except Held as held:
            result = "held"
            log.info("%s is %s", item.msg.subject, held)
            await item.msg.nak(delay=LOOK_AGAIN)
        except Stopping:
            result = "returned"
            await item.msg.nak()
        except NotNow:
            result = "returned"
            await item.msg.nak(delay=LOOK_AGAIN)
        except Fenced as fenced:  # the message is the new holder's now: our ack would take it away
            result = "fenced"
            log.info("%s: %s", item.msg.subject, fenced)
        except (Unavailable, nats.errors.Error) as error:
            log.warning("%s: %s; it will be delivered again", item.msg.subject, error)
        except Exception:
            log.exception("%s: it will be delivered again", item.msg.subject)
        else:
            result = "executed"
            await item.msg.ack()
        finally:
            self.dispatches[result] += 1
            del self._messages[item.msg.reply]
            self.slots.leave(entered=entered)

    async def _serve(self, item: Delivery) -> None:
        scope = subjects.parse_event(item.msg.subject).scope
        try:
            dispatched = RUN.decode(item.msg.data)
        except msgspec.DecodeError as error:
            log.warning("%s holds no event: %s", item.msg.subject, error)
            raise Stale from error
        if self._draining.is_set():
            raise Stopping
        if self._disk_full or self._engine_problem:  # it was on its way when the gate was closed
            raise NotNow
        with self.machines.foreseen(scope, dispatched.state.workspace_id):
            await self._lease_and_execute(scope, item, dispatched)

    async def _lease_and_execute(self, scope: Scope, item: Delivery, dispatched: RunEvent) -> None:
        kept = self._hot.execution(dispatched.run_id)
        position = await take_lease(self._log, self._liveness, scope, item, dispatched, worker=self.id, execution=kept)
        # Only the first dispatch of a run carries what it was started with; the log keeps it for the others.
        spec = self._hot.spec(dispatched.run_id)
        if spec is None:
            first = dispatched if "spec" in dispatched.data else await self._log.first(RUN, scope, dispatched.run_id)
            spec = spec_of(first)
        await self._end_former(dispatched.run_id)
        await self._execute(Execution(self._services, scope, position, spec), dispatched.cursor)

    async def _execute(self, execution: Execution, dispatch: int | None) -> None:
        run_id = execution.run_id
        self._executions[run_id] = execution
        try:
            if self._stopping.is_set():
                execution.stop(HandedBack("the worker was stopped"))
            await execution.run()
        finally:
            if self._executions.get(run_id) is execution:  # else we were fenced, and have leased it again
                del self._executions[run_id]
            self._progress.set()
        if execution.handed_back:
            await self._requeue(execution.scope, run_id, dispatch)

    async def _carry_on(self, carried: Carried) -> None:
        """See a run to its end that another worker has begun. There is no message of it: it was that worker's."""
        self.slots.occupy()
        result = "failed"
        try:
            execution = Execution(self._services, carried.scope, carried.position, carried.run.spec, left=carried.run)
            await self._execute(execution, execution.state.dispatch)
        except Fenced as fenced:
            result = "fenced"
            log.info("%s", fenced)
        except (HelmrError, nats.errors.Error) as error:
            log.warning("run %s: %s; control queues it again", carried.run.run_id, error)
        except Exception:
            log.exception("run %s: control queues it again when this worker is gone", carried.run.run_id)
        else:
            result = "executed"
        finally:
            self.dispatches[result] += 1
            self.slots.leave(entered=True)

    async def _end_former(self, run_id: str) -> None:
        """End what we executed of a run until it was taken from us; it may be back before we have noticed."""
        former = self._executions.get(run_id)
        if former is not None and former.waits:  # all that it had to do is done, and its process is kept for us
            del self._executions[run_id]
        elif former is not None:
            former.stop(Fenced(f"run {run_id} was taken from us, and has come back"))
            await self._until(lambda: run_id not in self._executions)

    async def _requeue(self, scope: Scope, run_id: str, dispatch: int | None) -> None:
        """Queue a run again that was handed back; when we take nothing any more, only once our machines are gone."""
        alive = self._liveness.alive()
        if self._draining.is_set():
            await self._machines_gone.wait()
            alive.discard(self.id)
        lane = await lane_of(self._log, scope, run_id, group=self.group, alive=alive)
        await redispatch(self._log, scope, run_id, dispatch=dispatch, lane=lane)

    async def _on_cancel(self, msg: Msg) -> None:
        execution = self._executions.get(subjects.parse_event(msg.subject).id)
        if execution is not None:
            execution.heed_cancel(RUN.decode(msg.data).state)

    async def _on_ping(self, msg: Msg) -> None:
        """That we have a connection is all that control wants to know."""
        await msg.respond(b"")

    async def _on_ended(self, msg: Msg) -> None:
        await self._hot.park(subjects.parse_event(msg.subject).id)

    async def _on_delete_order(self, msg: Msg) -> None:
        order = msgspec.json.decode(msg.data, type=StopOrder)
        await _answer(msg, self.machines.delete(Scope(order.project, order.environment), order.id))

    async def _on_stop_order(self, msg: Msg) -> None:
        await _answer(msg, self._stop_workspace(msgspec.json.decode(msg.data, type=StopOrder)))

    async def _stop_workspace(self, order: StopOrder) -> None:
        await self._hot.park_workspace(order.id)
        await self.machines.stop(Scope(order.project, order.environment), order.id, "stopped on request")

    async def _on_exec_order(self, msg: Msg) -> None:
        await _answer(msg, self.execs.accept(msgspec.json.decode(msg.data, type=ExecOrder)))

    async def _on_kill_order(self, msg: Msg) -> None:
        await _answer(msg, self.execs.kill(msgspec.json.decode(msg.data, type=KillRequest)))

    async def _beat(self) -> None:
        """Say that we are alive and at work: whatever else the server leaves without an answer must not keep us from that."""
        while True:
            await asyncio.sleep(topology.HEARTBEAT)
            await self._mind_disk()
            await self._announce()

    async def _mind_leases(self) -> None:
        """Keep our messages from being delivered again, and make sure that our leases are still ours."""
        while True:
            await asyncio.sleep(topology.HEARTBEAT)
            try:
                for msg in list(self._messages.values()):
                    await msg.in_progress()
                await self._check_leases()
                await self.execs.check()
            except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning("heartbeat: %s: %s", type(error).__name__, error)

    async def _announce(self) -> None:
        """Announce ourselves; an announcement that was lost with the server is given up in time for the next one."""
        said = self._cut_off.now()
        try:
            async with asyncio.timeout(topology.HEARTBEAT):
                await announce(self.nc, self._about())
            self._cut_off.heard(said)
        except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.warning("presence: %s: %s", type(error).__name__, error)
            self._presence.forgive()

    async def _watch_cut_off(self) -> None:
        """End what we execute before others may, if that is wanted; the server hears of it when it can hear us again."""
        if self._end_when_cut_off:
            await self._cut_off.watch(self._end_everything)

    def _end_everything(self) -> None:
        if self._executions:
            log.warning("the server cannot be reached: ending %s runs", len(self._executions))
        for execution in self._executions.values():
            execution.stop(HandedBack("its worker could not reach the server", grace=0.0))

    async def _check_leases(self) -> None:
        limit = asyncio.Semaphore(_CHECKS)

        async def check(execution: Execution) -> None:
            async with limit:
                try:
                    await execution.journal.check()
                except Fenced as fenced:
                    execution.stop(fenced)

        await asyncio.gather(*(check(execution) for execution in list(self._executions.values())))
        await asyncio.gather(*(self._check_hot(run, limit) for run in self._hot.each()))

    async def _check_hot(self, run: HotRun, limit: asyncio.Semaphore) -> None:
        """The news that a waiting run has ended, or goes on elsewhere, may have been missed."""
        async with limit:
            state = (await self._log.present(RUN, run.scope, run.run_id)).state
            if state.terminal or (state.lease is not None and state.lease.worker != self.id):
                await self._hot.park(run.run_id)

    async def _sweep(self) -> None:
        """Look for what dead neighbours left, every now and then."""
        while True:
            await asyncio.sleep(_SWEEP)
            await self._look_for_leftovers()

    async def _look_for_leftovers(self) -> None:
        try:
            await self._remove_leftovers(spare_running=True)
        except EngineUnavailable as error:
            self._lose_engine(error)
        except HelmrError as error:
            log.warning("looking for leftovers: %s", error)

    async def _mind_disk(self) -> None:
        """Take no runs while the disk is almost full: they would fail, and take those that run along."""
        full = await asyncio.to_thread(disk_is_full, self._home, before=self._disk_full)
        if full != self._disk_full:
            log.warning(
                "the disk of %s %s", self._home, "is almost full: taking nothing new" if full else "has room again"
            )
        self._disk_full = full
        if full:
            self._gate.clear()
        elif self._pulls:
            self._open_gate()

    def _open_gate(self) -> None:
        """Take runs, unless something speaks against it."""
        if not (self._draining.is_set() or self._stopping.is_set() or self._engine_problem or self._disk_full):
            self._gate.set()

    def _lose_engine(self, error: EngineUnavailable) -> None:
        """Take no runs while the engine does not answer: each would only come back at once."""
        if not self._engine_problem:
            log.warning("%s; taking nothing new until it can be used", error)
        self._engine_problem = error.message
        self._gate.clear()
        self._engine_lost.set()

    async def _mind_engine(self) -> None:
        """Say that the engine is away, and look every now and then whether it is back."""
        while True:
            await self._engine_lost.wait()
            self._engine_lost.clear()
            await self._announce()
            while self._engine_problem:
                await asyncio.sleep(_ENGINE_RETRY)  # also the first time: one that answers, and refuses, needs a moment
                await self._try_engine()
            log.warning("the engine can be used again")
            await self._look_for_leftovers()
            self._open_gate()
            await self._announce()

    async def _try_engine(self) -> None:
        try:
            await self.engine.check()
        except HelmrError as error:
            self._engine_problem = error.message
        else:
            self._engine_problem = ""


async def _answer(msg: Msg, work: Awaitable[None]) -> None:
    """Do what was ordered, and say that it is done, or why not."""
    try:
        await work
    except HelmrError as error:
        await msg.respond(msgspec.json.encode({"error": error.to_dict()}))
    else:
        await msg.respond(b"{}")
