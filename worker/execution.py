"""One leased run, from the lease to its end: prepare the workspace, start the task, carry what it says, judge how it ended."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import msgspec

from bus.bookmark import Torn
from bus.declared import find_sandbox, find_task
from bus.leases import bury
from bus.log import Position
from helmr import events
from helmr.errors import EngineUnavailable, HelmrError, Unavailable
from helmr.events import Failure, RunEvent, RunSpec, RunState
from helmr.models import Deployment
from helmr.subjects import Scope
from worker.answers import Answers
from worker.captures import Occasion
from worker.claims import Misplaced
from worker.conclusion import Conclusion
from worker.conversation import Conversation, patient_writer
from worker.ending import HURRY, Ending, HandedBack
from worker.engine import Exited
from worker.hot import HotRun, discard
from worker.log_pump import LogPump
from worker.machine_maker import Needs
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
from worker.preparation import BrokenOff, Preparation
from worker.run_journal import Fenced, RunJournal
from worker.run_start import RunStart
from worker.services import Services
from worker.stages import Stages
from worker.task_process import task_template
from worker.unless import cancel_and_wait

log = logging.getLogger(__name__)

#: Seconds that it may take to go on with a process that is there.
_GO_ON = 15.0
#: Seconds in which a killed process tree is gone.
_KILL_TIME = 5.0


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
        self._ending = Ending(self.run_id)
        self.journal = RunJournal(services.log, scope, position, self.heed_cancel, appended=self._settle)
        state = self.journal.state
        self._pump = LogPump(
            services.log.js,
            scope,
            self.run_id,
            attempt=state.attempt or 1,
            dispatch=state.dispatch_attempt,
            landed=self._settle,
        )
        answers = Answers(services.log, scope, self.run_id, spec, self.journal)
        writer = patient_writer(answers, spec, self.journal)
        self._stages = Stages()
        self._conversation = Conversation(
            answers, self.journal, self._pump, writer, end=lambda: self._ending.end_process(0), stages=self._stages
        )
        self._preparation = Preparation(services, scope, spec, self.journal, self._ending)
        self._conclusion = Conclusion(
            services, scope, spec, journal=self.journal, pump=self._pump, conversation=self._conversation
        )
        self._entered = False
        self._hot = left or services.hot.take(self.run_id)
        self._conversation.began = self._hot is not None
        self.heed_cancel(state)

    @property
    def state(self) -> RunState:
        """The run's state as last known here."""
        return self.journal.state

    @property
    def waits(self) -> bool:
        """Whether the run waits, and its lease has ended here."""
        return self.journal.released

    @property
    def handed_back(self) -> bool:
        """Whether the lease was given up and the run must be queued again."""
        return self._conclusion.handed_back

    def _settle(self) -> None:
        self._conversation.settle()

    def stop(self, reason: BaseException) -> None:
        """End the execution for a reason of the worker's own: it is fenced, or it hands the run back."""
        self._ending.stop(reason)

    def heed_cancel(self, state: RunState) -> None:
        """Take note of what a state of the run, heard live or read, says about its end."""
        self._ending.heed_cancel(state)

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
            await self._conclusion.hand_back(f"the worker failed: {group.exceptions[0]!r}"[:500])

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(self._pump.run())
            writer = group.create_task(self.journal.run())
            try:
                await self._lead()
            finally:
                if not self.waits:
                    self._conversation.forget()
                await self._pump.close()
                writer.cancel()
                if isinstance(self._ending.reason, Fenced):
                    pump.cancel()

    async def _lead(self) -> None:
        """Race the work against the reasons to stop it."""
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(self._ending.stopped.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.reason is not None and not work.done():
                await self._ending.end_in_a_hurry()
                if self._ending.has_process or self._conversation.began:
                    await asyncio.wait({work}, timeout=HURRY + _KILL_TIME)
                await cancel_and_wait(work)
                if self.state.lease is not None:
                    await self._after_stop(self._ending.reason)
            else:
                work.result()
        finally:
            stop.cancel()
            if not work.done():
                await self._ending.end_process(0)
                await cancel_and_wait(work)

    async def _after_stop(self, reason: BaseException) -> None:
        if not isinstance(reason, HandedBack):
            raise reason
        await self._conclusion.stop(str(reason))

    async def _work(self) -> None:
        started = asyncio.get_running_loop().time()
        # The deadline of a process that is there is in force already; what is to be done here may take a moment.
        limit = max(self.spec.max_duration - self.state.active_seconds, 0.0 if self._hot is None else _GO_ON)
        try:
            outcome = masked(await self._attempt(started + limit), self._preparation.secrets.masker)
        finally:
            await self._leave_unused()
        if self._ending.reason is None or isinstance(outcome, Succeeded):  # what was done just in time is done
            await self._conclusion.conclude(outcome)

    async def _attempt(self, deadline: float) -> Outcome:
        """Prepare and execute; errors on the way are outcomes, too."""
        try:
            deployment = await self.services.deployments.load(self.scope, self.spec.deployment_id)
            task = find_task(deployment, self.spec.task_id)
            needs = self._needs(deployment, task)
            try:
                return await self._prepare_and_execute(task, needs, deadline)
            except BrokenOff:
                return await self._unprepared(needs)
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

    def _needs(self, deployment: Deployment, task: dict[str, Any]) -> Needs:
        sandbox = find_sandbox(deployment, task["sandbox"])
        template = task_template(deployment, task, sandbox)
        return Needs(deployment, sandbox, self._progress, template, self._stages.over, self._preparation.secret_values)

    async def _prepare_and_execute(self, task: dict[str, Any], needs: Needs, deadline: float) -> Outcome:
        if task.get("secrets"):
            await self._preparation.fetch_secrets(task["secrets"], deadline)
            self._stages.over("secrets")
        if self._hot is None:  # only a new process will want it
            await self._preparation.fetch_payload(deadline)
        return await self._use_machine(task, needs, deadline)

    async def _leave_unused(self) -> None:
        """End a process that was kept for us, if we never got to it."""
        if self._hot is not None and not self._entered:
            await asyncio.shield(discard(self._hot.process))
            await self._hot.use.__aexit__(None, None, None)

    async def _capture(self) -> None:
        """Have what the attempt left become a version, before its end is announced."""
        if self._ending.reason is not None:
            return  # the stop of the machine will do
        problem = await self.services.machines.capture(
            self.scope, self.spec.workspace_id, Occasion("the end of a run", self.run_id)
        )
        if problem is not None:
            self._progress(f"there is no version of the workspace's files: {problem}")

    async def _use_machine(self, task: dict[str, Any], needs: Needs, deadline: float) -> Outcome:
        """Execute in the machine of the workspace, and leave it after that; unless the run waits and is kept there."""
        self._entered = True
        if self._hot is not None:
            use, machine = self._hot.use, self._hot.machine
        else:
            use = self.services.machines.use(self.scope, self.spec.workspace_id, needs)
            machine = await self._preparation.enter(use, needs, deadline)
        start = RunStart(
            self.services,
            self.scope,
            self.spec,
            journal=self.journal,
            conversation=self._conversation,
            preparation=self._preparation,
        )
        outcome: Outcome | None = None
        try:
            process = await start.start(machine, needs, task, hot=self._hot, deadline=deadline)
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

    async def _unprepared(self, needs: Needs) -> Outcome:
        spec, ending = self.spec, self._ending
        if self.state.dispatch_attempt > 1 and self._hot is None and not ending.forced.is_set():
            await self._preparation.replace_former(needs)
        if ending.cancelled.is_set():
            return Cancelled()
        message = f"ran longer than {spec.max_duration:g} s (the workspace was still being prepared)"
        return Failed(Failure(code="max_duration", message=message, detail={"limit_seconds": spec.max_duration}))

    def _progress(self, message: str) -> None:
        log.info("run %s: %s", self.run_id, message)
        record = {"level": "info", "message": message, "fields": {"source": "helmr"}, "at": events.now().isoformat()}
        self._pump.note(msgspec.json.encode(record) + b"\n")

    async def _execute(self, running: HotRun, task: dict[str, Any], sandbox: dict[str, Any]) -> Outcome:
        files = self.services.machines.files(self.spec.workspace_id)
        with self._ending.watch(running.process, grace=self.spec.cancel_grace, files=files, disk=sandbox.get("disk")):
            try:
                exited = await self._conversation.listen(running, self.services.hot, self._preparation.secrets.masker)
            except BaseException:
                await asyncio.shield(discard(running.process))  # nothing of it may live on when nobody listens
                raise
        if exited is not None and (lost := loss(exited, asked=self._asked)) is not None:
            raise Unavailable(f"its machine was lost: {lost}")
        await self._capture()
        if exited is None:
            return Waits()
        if self._ending.overfull is not None and not self._ending.cancelled.is_set():
            return overfull_disk(self._ending.overfull, sandbox["disk"])
        return await self._judge(exited, task, sandbox)

    async def _judge(self, exited: Exited, task: dict[str, Any], sandbox: dict[str, Any]) -> Outcome:
        """In a thread, if there is much to check: heartbeats must go on."""
        said = self._conversation.said
        verdict = functools.partial(
            judge,
            said,
            exited,
            cancel_requested=self._ending.cancelled.is_set(),
            max_duration=self.spec.max_duration,
            memory=sandbox.get("memory"),
            schema=task.get("output_schema"),
        )
        return await asyncio.to_thread(verdict) if said.in_parts else verdict()

    @property
    def _asked(self) -> bool:
        """Whether we have the process ended: for one of the reasons there are, or because it has broken the protocol."""
        return self._ending.asked or self._conversation.said.broken is not None
