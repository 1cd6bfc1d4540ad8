"""One leased run, from the lease to its end: prepare the workspace, start the task, carry what it says, judge how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import msgspec

from bus import bookmark, waits
from bus.bookmark import Bookmark, Torn
from bus.leases import bury
from bus.log import Position
from bus.services.secrets import ReleaseRequest
from bus.starts import find_sandbox, find_task
from helmr import chunks, events
from helmr.errors import Conflict, EngineUnavailable, HelmrError, Unavailable
from helmr.events import Draft, Failure, RunEvent, RunSpec, RunState
from helmr.models import Deployment
from helmr.reducers import run as rules
from helmr.reducers.journal import Recorded
from helmr.subjects import Scope
from worker import large_values, run_secrets
from worker.answers import Answers
from worker.captures import Occasion
from worker.conversation import Conversation, patient_writer
from worker.disk_watch import overfull
from worker.engine import Exited, Machine, Process, ProcessSpec
from worker.hot import HotRun, discard
from worker.log_pump import LogPump
from worker.machines import Misplaced, Needs
from worker.outcome import (
    Cancelled,
    Failed,
    Lost,
    Outcome,
    Succeeded,
    Waits,
    judge,
    loss,
    masked,
    overfull_disk,
    prevented,
)
from worker.run_journal import Fenced, RunJournal
from worker.run_secrets import RunSecrets
from worker.services import Services
from worker.stages import Stages
from worker.task_process import task_process, task_template
from worker.unless import cancel_and_wait, unless

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds a process gets to end when the run is handed back or the lease is lost.
_HURRY = 1.0
#: Seconds that it may take to go on with a process that is there.
_GO_ON = 15.0
#: Seconds in which a killed process tree is gone.
_KILL_TIME = 5.0
#: Seconds that it may take to have a machine only for the sake of ending an earlier one: somebody waits for the run's end.
_REPLACE_TIME = 10.0


class HandedBack(Exception):
    """The worker stops, or cannot be heard: the run goes back to the queue, its processes ended within ``grace`` seconds."""

    def __init__(self, reason: str, *, grace: float = _HURRY) -> None:
        super().__init__(reason)
        self.grace = grace


class Execution:
    """The execution of one dispatch of a run by this worker."""

    def __init__(
        self,
        services: Services,
        scope: Scope,
        position: Position[RunEvent],
        spec: RunSpec,
        *,
        left: HotRun | None = None,
    ) -> None:
        if position.event is None:
            raise Fenced("nothing to execute")
        self.services = services
        self.scope = scope
        self.spec = spec
        self.run_id = position.event.run_id
        self.journal = RunJournal(services.log, scope, position, self.heed_cancel, appended=self._settle)
        state = self.journal.state
        self.pump = LogPump(
            services.log.js,
            scope,
            self.run_id,
            attempt=state.attempt or 1,
            dispatch=state.dispatch_attempt,
            landed=self._settle,
        )
        answers = Answers(services.log, scope, self.run_id, spec, self.journal)
        writer = patient_writer(answers, spec, self.journal, executed_before=self._executed_before)
        self._stages = Stages()
        self.conversation = Conversation(
            answers, self.journal, self.pump, writer, end=lambda: self._end_process(0), stages=self._stages
        )
        self.secrets = run_secrets.NONE
        self._payload: Any = spec.payload
        #: Whether the lease was given up and the run must be queued again.
        self.handed_back = False
        self._process: Process | None = None
        self._entered = False
        self._hot = left or services.hot.take(self.run_id)
        self.conversation.began = self._hot is not None
        self._cancelled = asyncio.Event()
        self._forced = asyncio.Event()
        self.heed_cancel(state)
        self._stopping: BaseException | None = None
        #: Bytes in the workspace when they were found to be too many.
        self._overfull: int | None = None
        self._stop = asyncio.Event()

    @property
    def state(self) -> RunState:
        """The run's state as last known here."""
        return self.journal.state

    @property
    def waits(self) -> bool:
        """Whether the run waits, and its lease has ended here."""
        return self.journal.released

    def _settle(self) -> None:
        self.conversation.settle()

    def stop(self, reason: BaseException) -> None:
        """End the execution for a reason of the worker's own: it is fenced, or it hands the run back."""
        if self._stopping is None:
            self._stopping = reason
            self._stop.set()

    def heed_cancel(self, state: RunState) -> None:
        """Take note of what a state of the run, heard live or read, says about its end."""
        if state.cancel is not None:
            self._cancelled.set()
            if state.cancel.force:
                self._forced.set()

    async def run(self) -> None:
        """Execute to the end. What goes wrong becomes the run's failure; what goes wrong here gives the run back.

        Raises:
            Fenced: the lease was lost; nothing was said about it.
        """
        try:
            await self._run()
        except ExceptionGroup as group:
            if group.subgroup(Fenced) is not None:
                raise Fenced(f"run {self.run_id} is no longer ours") from group
            log.exception("run %s: giving it back", self.run_id)
            if self.state.lease is not None:  # what was not stored of its log is lost with what has failed
                await bury(self.services.log, self.scope, self.state)
            await self._hand_back(f"the worker failed: {group.exceptions[0]!r}"[:500])

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(self.pump.run())
            writer = group.create_task(self.journal.run())
            try:
                await self._lead()
            finally:
                if not self.waits:
                    self.conversation.forget()
                await self.pump.close()
                writer.cancel()
                if isinstance(self._stopping, Fenced):
                    pump.cancel()

    async def _lead(self) -> None:
        """Race the work against the reasons to stop it."""
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping is not None and not work.done():
                await self._end_process(self._stopping.grace if isinstance(self._stopping, HandedBack) else _HURRY)
                if self._process is not None or self.conversation.began:
                    await asyncio.wait({work}, timeout=_HURRY + _KILL_TIME)
                await cancel_and_wait(work)
                if self.state.lease is not None:
                    await self._after_stop(self._stopping)
            else:
                work.result()
        finally:
            stop.cancel()
            if not work.done():
                await self._end_process(0)
                await cancel_and_wait(work)

    async def _after_stop(self, reason: BaseException) -> None:
        if not isinstance(reason, HandedBack):
            raise reason
        await self._store_logs(chunks.WORKER_LOST)
        await self._hand_back(str(reason), orderly=True)

    async def _work(self) -> None:
        started = asyncio.get_running_loop().time()
        spec = self.spec
        # The deadline of a process that is there is in force already; what is to be done here may take a moment.
        limit = max(spec.max_duration - self.state.active_seconds, 0.0 if self._hot is None else _GO_ON)
        try:
            outcome = masked(await self._attempt(spec, started + limit), self.secrets.masker)
        finally:
            await self._leave_unused()
        if self._stopping is None or isinstance(outcome, Succeeded):  # what was done just in time is done
            await self._conclude(spec, outcome)

    async def _attempt(self, spec: RunSpec, deadline: float) -> Outcome:
        """Prepare and execute; errors on the way are outcomes, too."""
        try:
            deployment = await self.services.deployments.load(self.scope, spec.deployment_id)
            task = find_task(deployment, spec.task_id)
            sandbox = find_sandbox(deployment, task)
            template = task_template(deployment, task, sandbox)
            needs = Needs(deployment, sandbox, self._progress, template, self._stages.over, self._secret_values)
            if task.get("secrets"):
                secrets = await self._unless_cancelled(self._fetch_secrets(task["secrets"]), deadline)
                if secrets is None:
                    return await self._unprepared(needs)
                self.secrets = secrets
                self._stages.over("secrets")
            if not await self._have_payload(deadline):
                return await self._unprepared(needs)
            return await self._use_machine(deployment, task, needs, deadline)
        except Misplaced as elsewhere:
            return Lost(f"the workspace is elsewhere: lane {elsewhere.lane}", orderly=True)
        except Torn as torn:
            return Lost(f"its process cannot go on here: {torn}")
        except Unavailable as error:
            if isinstance(error, EngineUnavailable):
                self.services.engine_lost(error)
            return Lost(f"the workspace could not be used: {error.message}")
        except (HelmrError, OSError) as error:
            return prevented(error)

    async def _leave_unused(self) -> None:
        """End a process that was kept for us, if we never got to it."""
        if self._hot is not None and not self._entered:
            await asyncio.shield(discard(self._hot.process))
            await self._hot.use.__aexit__(None, None, None)

    async def _capture(self) -> None:
        """Have what the attempt left become a version, before its end is announced."""
        if self._stopping is not None:
            return  # the stop of the machine will do
        problem = await self.services.machines.capture(
            self.scope, self.spec.workspace_id, Occasion("the end of a run", self.run_id)
        )
        if problem is not None:
            self._progress(f"there is no version of the workspace's files: {problem}")

    async def _fetch_secrets(self, declared: list[dict[str, Any]]) -> RunSecrets:
        return run_secrets.place(declared, await self._secret_values())

    async def _secret_values(self) -> dict[str, str]:
        """The values of all secrets that the run may have, its image's and its task's."""
        lease = self.journal.lease
        request = ReleaseRequest(run_id=self.run_id, worker=lease.worker, lease=lease.cursor)
        try:
            return await run_secrets.fetch(self.services.log.nc, self.scope, request)
        except Conflict:
            await self.journal.check()
            raise

    async def _have_payload(self, deadline: float) -> bool:
        """Fetch a large payload, if a new process will want it; False: a cancel or the deadline came first."""
        if self.spec.payload_artifact is None or self._hot is not None:
            return True
        payload = await self._unless_cancelled(
            large_values.fetch(self.services.values, self.spec.payload_artifact), deadline
        )
        if payload is None:
            return False
        self._payload = msgspec.Raw(payload)
        return True

    async def _use_machine(
        self, deployment: Deployment, task: dict[str, Any], needs: Needs, deadline: float
    ) -> Outcome:
        """Execute in the machine of the workspace, and leave it after that; unless the run waits and is kept there."""
        self._entered = True
        if self._hot is not None:
            use, machine = self._hot.use, self._hot.machine
        else:
            use = self.services.machines.use(self.scope, self.spec.workspace_id, needs)
            found = await self._enter(use, deployment, deadline)
            if found is None:
                return await self._unprepared(needs)
            machine = found
        outcome: Outcome | None = None
        try:
            process = await self._start(machine, needs, task, deadline)
            running = HotRun(
                scope=self.scope, run_id=self.run_id, spec=self.spec, process=process, machine=machine, use=use
            )
            outcome = await self._execute(running, task, needs.sandbox)
        except Unavailable as gone:
            await self.services.machines.forget(self.scope, self.spec.workspace_id, machine, gone.message)
            raise
        finally:
            if not isinstance(outcome, Waits):
                await use.__aexit__(None, None, None)
        return outcome

    async def _enter(
        self, use: AbstractAsyncContextManager[Machine], deployment: Deployment, deadline: float
    ) -> Machine | None:
        if self.services.machines.at_hand(self.scope, self.spec.workspace_id, deployment):
            return await use.__aenter__()  # at once: there is nothing to be cancelled
        return await self._unless_cancelled(use.__aenter__(), deadline)

    async def _unprepared(self, needs: Needs) -> Outcome:
        spec = self.spec
        if self.state.dispatch_attempt > 1 and self._hot is None and not self._forced.is_set():
            await self._replace_former(needs)
        if self._cancelled.is_set():
            return Cancelled()
        message = f"ran longer than {spec.max_duration:g} s (the workspace was still being prepared)"
        return Failed(Failure(code="max_duration", message=message, detail={"limit_seconds": spec.max_duration}))

    async def _replace_former(self, needs: Needs) -> None:
        """Prepare the machine all the same: what an earlier holder left running ends with its own, in whose place it comes."""
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(_REPLACE_TIME),
                self.services.machines.use(self.scope, self.spec.workspace_id, needs),
            ):
                log.debug("run %s: nothing of it is left in its workspace", self.run_id)

    async def _unless_cancelled(self, work: Coroutine[Any, Any, T], deadline: float) -> T | None:
        """What is being prepared, or None when a cancel or the deadline came first."""
        return await unless(self._cancelled, work, max(deadline - asyncio.get_running_loop().time(), 0))

    def _progress(self, message: str) -> None:
        log.info("run %s: %s", self.run_id, message)
        record = {"level": "info", "message": message, "fields": {"source": "helmr"}, "at": events.now().isoformat()}
        self.pump.note(msgspec.json.encode(record) + b"\n")

    async def _execute(self, running: HotRun, task: dict[str, Any], sandbox: dict[str, Any]) -> Outcome:
        self._process = running.process
        canceller = asyncio.create_task(self._cancel_when_asked(self.spec.cancel_grace))
        watcher = asyncio.create_task(self._end_when_overfull(sandbox))
        try:
            exited = await self.conversation.listen(running, self.services.hot, self.secrets.masker)
        except BaseException:
            await asyncio.shield(discard(running.process))  # nothing of it may live on when nobody listens
            raise
        finally:
            canceller.cancel()
            watcher.cancel()
            self._process = None
        if exited is not None and (lost := loss(exited, asked=self._asked)) is not None:
            raise Unavailable(f"its machine was lost: {lost}")
        await self._capture()
        if exited is None:
            return Waits()
        if self._overfull is not None and not self._cancelled.is_set():
            return overfull_disk(self._overfull, sandbox["disk"])
        return await self._judge(exited, task, sandbox)

    async def _judge(self, exited: Exited, task: dict[str, Any], sandbox: dict[str, Any]) -> Outcome:
        """In a thread, if there is much to check: heartbeats must go on."""
        said = self.conversation.said
        verdict = functools.partial(
            judge,
            said,
            exited,
            cancel_requested=self._cancelled.is_set(),
            max_duration=self.spec.max_duration,
            memory=sandbox.get("memory"),
            schema=task.get("output_schema"),
        )
        return await asyncio.to_thread(verdict) if said.in_parts else verdict()

    @property
    def _asked(self) -> bool:
        """Whether we have the process ended: somebody wants that, we stop, its disk is full, or it has broken the protocol."""
        ended = self._cancelled.is_set() or self._stopping is not None or self._overfull is not None
        return ended or self.conversation.said.broken is not None

    async def _start(self, machine: Machine, needs: Needs, task: dict[str, Any], deadline: float) -> Process:
        """The process that was kept while the run waited, told the answer; or a new one, which knows what is recorded."""
        try:
            await self.journal.confirm()
        except Fenced:
            if self._hot is not None:
                await discard(self._hot.process)
            raise
        left = max(deadline - asyncio.get_running_loop().time(), 0.1)
        if self._hot is not None and await self._go_on(self._hot, left):
            return self._hot.process
        if self._hot is not None and self.spec.payload_artifact is not None:  # it was not to be needed
            self._payload = msgspec.Raw(await large_values.fetch(self.services.values, self.spec.payload_artifact))
        return await machine.start(await self._process_spec(needs, task, left))

    async def _go_on(self, hot: HotRun, left: float) -> bool:
        """Tell a process that was kept what came of its wait; whether it lives to hear it.

        Raises:
            Torn: it was not waiting, but left by a worker that died, and nobody can tell how far it had got.
        """
        try:
            await hot.process.limit(left, self.spec.cancel_grace)
            if hot.question:
                await self.conversation.answers.tell(hot.process, hot.question)
            else:
                self.conversation.bookmark = await self._find_bookmark(hot)
                self.conversation.began = self.conversation.bookmark.began
        except Conflict:
            await discard(hot.process)
            return False
        except BaseException:
            await asyncio.shield(discard(hot.process))
            raise
        return True

    async def _find_bookmark(self, hot: HotRun) -> Bookmark:
        """Where the dead worker got to whose process this is."""
        attempt, dispatch = self.state.attempt or 1, self.state.dispatch_attempt
        if hot.dispatches + 1 != dispatch:
            raise Torn("it was executed elsewhere meanwhile")
        await bookmark.silence(self.services.log.nc, hot.former)
        return await bookmark.find(
            self.services.log.js, self.scope, self.run_id, execution=hot.execution, attempt=attempt, dispatch=dispatch
        )

    @property
    def _executed_before(self) -> bool:
        return self.state.dispatch_attempt > 1 or (self.state.attempt or 1) > 1

    async def _recorded(self) -> Recorded:
        """What is recorded of earlier executions."""
        if not self._executed_before:
            return Recorded(entries=[])
        return await self.conversation.answers.recorded()

    async def _process_spec(self, needs: Needs, task: dict[str, Any], left: float) -> ProcessSpec:
        return task_process(
            self.run_id,
            self.spec,
            self.state,
            deployment=needs.deployment,
            module=task["module"],
            preload=tuple(needs.sandbox.get("preload", ())),
            payload=self._payload,
            recorded=await self._recorded(),
            secrets=self.secrets,
            deadline=left,
        )

    async def _cancel_when_asked(self, grace: float) -> None:
        await self._cancelled.wait()
        if not self._forced.is_set():
            await self._end_process(grace)
            await self._forced.wait()
        await self._end_process(0)

    async def _end_when_overfull(self, sandbox: dict[str, Any]) -> None:
        limit = sandbox.get("disk")
        if limit:
            used = await overfull(self.services.machines.files(self.spec.workspace_id), limit)
            self._overfull = used
            await self._end_process(0)

    async def _conclude(self, spec: RunSpec, outcome: Outcome) -> None:
        if isinstance(outcome, Waits):
            await self._look_for_answer()
            return
        await self._store_logs(chunks.WORKER_LOST if isinstance(outcome, Lost) else None)
        logs = self.pump.totals
        match outcome:
            case Succeeded():
                data = await large_values.told(self.services.values, outcome.output) | {"exit_code": 0, "logs": logs}
                draft = Draft(kind="succeeded", data=data, message="succeeded", source="worker")
                await self.journal.append(lambda _: draft)
            case Cancelled():
                await self.journal.append(lambda s: rules.cancelled(_reason(s), source="worker", logs=logs))
            case Lost():
                await self._hand_back(outcome.reason, orderly=outcome.orderly)
            case Failed():
                failure, code = outcome.failure, outcome.exit_code
                at = events.now()
                await self.journal.append(
                    lambda s: rules.end_attempt(s, spec, failure, at=at, exit_code=code, logs=logs)
                )

    async def _look_for_answer(self) -> None:
        """What the run waits for may have come before it waited. The run is not ours any more, and control looks, too."""
        try:
            await waits.settle(self.services.log, self.scope, self.run_id)
        except Unavailable as error:
            log.info("run %s waits; whether that is over is for control to find out: %s", self.run_id, error)

    async def _store_logs(self, tombstone: str | None) -> None:
        """Have everything written stored before the event that ends the attempt says so."""
        if tombstone:
            self.pump.tombstone(tombstone)
        await self.journal.flush()
        await self.pump.drain()

    async def _hand_back(self, reason: str, *, orderly: bool = False) -> None:
        """Give the lease up; the worker has the run queued again, when it is ready for that."""
        at = events.now()
        state = await self.journal.append(
            lambda state: rules.abandon(
                state, self.spec, reason=reason, began=self.conversation.began, at=at, orderly=orderly
            )
        )
        self.handed_back = state.status == "queued"

    async def _end_process(self, grace: float) -> None:
        if self._process is not None:
            try:
                await self._process.cancel(grace)
            except HelmrError as error:
                log.debug("run %s: %s", self.run_id, error)  # the machine is gone, and the process with it


def _reason(state: RunState) -> str | None:
    return state.cancel.reason if state.cancel else None
