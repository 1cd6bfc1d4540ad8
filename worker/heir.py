"""What becomes of the processes in a machine that a dead worker has left: which of them go on, and under which lease.

A run that was being executed is leased anew, with its process: the compare-and-set append decides between this and whoever else
wants the run. The process of a run that waits is kept, and so is that of a run which somebody has taken from the dead worker
and nobody has leased since. Everything else is ended: what belongs to runs that have ended or go on elsewhere, and execs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import NamedTuple

from bus import bookmark, topology
from bus.bookmark import Torn
from bus.declared import find_sandbox, find_task
from bus.deployments import Deployments
from bus.leases import spec_of
from bus.log import RUN, Log, Position
from bus.queueing import redispatch
from bus.stored import get_message
from helmr import events, ids, subjects
from helmr.errors import Conflict, HelmrError
from helmr.events import RunEvent, RunSpec, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope
from worker.claims import Misplaced
from worker.engine import Inheritance, Message, Process
from worker.hot import MAX_PARK_AFTER, HotRun, HotRuns, discard, execution_of
from worker.machine_maker import Needs
from worker.machines import Machines

log = logging.getLogger(__name__)

#: Seconds that the process of a run is kept which is queued, for the run to be leased by this worker.
_KEPT = 60.0
#: Seconds for a supervisor to send again what nobody has acknowledged.
_RESENT = 10.0


class Carried(NamedTuple):
    """A run that is leased to this worker now, with the process that goes on."""

    scope: Scope
    position: Position[RunEvent]
    run: HotRun


class Heir:
    """Goes through what was left, on behalf of one worker."""

    def __init__(
        self, event_log: Log, deployments: Deployments, machines: Machines, hot: HotRuns, *, worker_id: str
    ) -> None:
        self._log = event_log
        self._deployments = deployments
        self._machines = machines
        self._hot = hot
        self._worker_id = worker_id

    async def take(self, scope: Scope, found: Inheritance) -> list[Carried]:
        """The runs that go on at once; what else can go on is kept, the rest has been ended."""
        latest, others = _sort(found.processes.values())
        taken = await asyncio.gather(
            *(self._take(scope, found, run_id, process) for run_id, process in latest.items()),
        )
        await asyncio.gather(*map(discard, others))
        return [each for each in taken if each is not None]

    async def _take(self, scope: Scope, found: Inheritance, run_id: str, process: Process) -> Carried | None:
        try:
            state: RunState | None = (await self._log.last(RUN, scope, run_id)).state
            if state is not None and not state.terminal:
                return await self._go_on(scope, found, state, process)
        except (HelmrError, Misplaced, Torn, TimeoutError) as error:
            log.info("run %s does not go on in the process that is left: %s", run_id, error)
        await discard(process)
        return None

    async def _go_on(self, scope: Scope, found: Inheritance, state: RunState, process: Process) -> Carried | None:
        run = await self._enter(scope, found, state, process)
        try:
            if state.status == "running":
                run.dispatches = state.dispatch_attempt
                return Carried(scope, await self._lease(scope, found, run), run)
            await self._keep(run, state)
        except BaseException:
            await run.use.__aexit__(None, None, None)
            raise
        return None

    async def _enter(self, scope: Scope, found: Inheritance, state: RunState, process: Process) -> HotRun:
        """The process, in a machine that is in use because of it."""
        spec = spec_of(await self._log.first(RUN, scope, state.id))
        deployment = await self._deployments.load(scope, spec.deployment_id)
        sandbox = find_sandbox(deployment, find_task(deployment, spec.task_id)["sandbox"])
        use = self._machines.use(scope, spec.workspace_id, Needs(deployment, sandbox, lambda _: None))
        machine = await use.__aenter__()
        return HotRun(
            scope=scope, run_id=state.id, spec=spec, process=process, machine=machine, use=use, former=found.former
        )

    async def _lease(self, scope: Scope, found: Inheritance, run: HotRun) -> Position[RunEvent]:
        position = await self._log.transact(
            RUN,
            scope,
            run.run_id,
            lambda state: rules.inherit(state, worker=self._worker_id, former=found.former, execution=run.execution),
        )
        log.info("run %s goes on: taken over from %s", run.run_id, found.former)
        return position

    async def _keep(self, run: HotRun, state: RunState) -> None:
        """Keep the process of a run that waits, or is queued."""
        leased = await self._last(run, "leased")
        waited = await self._last(run, "waiting")
        if leased is None or run.execution not in {leased.cursor, leased.data.get("execution")}:
            raise Conflict("it was executed elsewhere meanwhile")
        run.dispatches = leased.dispatch_attempt
        now = asyncio.get_running_loop().time()
        run.park_at = now + _KEPT
        if waited is not None and waited.cursor > leased.cursor:
            run.question = await self._question(run)
            run.landed = (await self._log.js.stream_info(topology.LOGS)).state.last_seq
            run.park_at = now + _left(run.spec, waited)
        elif state.status == "waiting" or leased.attempt != state.next_attempt:
            raise Conflict("another attempt is due")
        self._hot.keep(run)
        if state.dispatch is not None and state.lane != f"@{self._worker_id}":
            await redispatch(self._log, run.scope, run.run_id, dispatch=state.dispatch, lane=f"@{self._worker_id}")

    async def _last(self, run: HotRun, kind: str) -> RunEvent | None:
        found = await get_message(self._log.js, topology.RUNS, subjects.event(run.scope, "run", run.run_id, kind))
        return RUN.decode(found[1]) if found is not None else None

    async def _question(self, run: HotRun) -> int:
        """What the process asked when it began to wait; all that it said before that is stored."""
        waited = await bookmark.waited(self._log.js, run.scope, run.run_id, run.execution)
        async with asyncio.timeout(_RESENT):
            async for frame in run.process.frames():
                if run.process.at == waited and isinstance(frame, Message) and frame.body.get("op") == "wait":
                    return int(frame.body["id"])
                if run.process.at >= waited:
                    break
        raise Torn("what it waits for is not known")


def _sort(processes: Iterable[Process]) -> tuple[dict[str, Process], list[Process]]:
    """The latest process of each run, and everything else."""
    latest: dict[str, Process] = {}
    others = []
    for process in processes:
        run_id, _, execution = process.id.rpartition("-")
        known = latest.get(run_id)
        if not ids.is_id(run_id, "run") or (known is not None and execution_of(known.id) > int(execution)):
            others.append(process)
        else:
            others += [known] if known is not None else []
            latest[run_id] = process
    return latest, others


def _left(spec: RunSpec, waited: RunEvent) -> float:
    """Seconds for which the process of a waiting run is still to be kept."""
    return min(spec.park_after, MAX_PARK_AFTER) - (events.now() - waited.at).total_seconds()
