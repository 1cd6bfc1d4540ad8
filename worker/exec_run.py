"""One exec on its worker: create it, bring the workspace to life, start the process, pass on what goes in and out."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from bus.declared import find_sandbox
from bus.deployments import Deployments
from bus.log import EXEC, Log, Position
from bus.services.execs import ExecOrder
from helmr import exec_frames
from helmr.errors import Conflict, HelmrError, Unavailable
from helmr.events import Draft, ExecEvent, ExecState
from helmr.exec_frames import Ack, Attach, Data, End, Leave, Resize, Signal
from helmr.reducers import exec as rules
from helmr.subjects import Scope
from worker.captures import Occasion
from worker.claims import Misplaced
from worker.engine import Exited, Machine, Output, Process, ProcessSpec, Terminal
from worker.exec_client import ExecClient, InputBuffer
from worker.exec_output import ExecOutput
from worker.hot import discard
from worker.machine_maker import Needs
from worker.machines import Machines
from worker.run_journal import STALE
from worker.unless import cancel_and_wait, unless

log = logging.getLogger(__name__)

#: Seconds an exec gets to end when its client is gone or its worker stops.
HURRY = 2.0


class _Withdrawn(Exception):
    """The exec is to end before it has begun."""


class _Settled(Exception):
    """The exec was given up for lost before it had begun, or just then."""


class ExecRun:
    """The execution of one exec by this worker."""

    def __init__(
        self, event_log: Log, deployments: Deployments, machines: Machines, order: ExecOrder, *, worker_id: str
    ) -> None:
        self.id = order.id
        self.scope = Scope(order.project, order.environment)
        self._log = event_log
        self._deployments = deployments
        self._machines = machines
        self._order = order
        self._created_at = 0.0
        self._position: Position[ExecEvent] = Position(0, None)  #: of what we have appended last
        #: How it is once it is ours to execute; or why it is not.
        self.created: asyncio.Future[ExecState] = asyncio.get_running_loop().create_future()
        self._worker_id = worker_id
        self._buffer = InputBuffer()
        self._output = ExecOutput(event_log, self.scope, order.id, kept=order.kept)
        self._client = ExecClient(event_log.nc, (self.scope, order.id), order.client, self._buffer, self._hang_up)
        self._process: Process | None = None
        self._size = Terminal(rows=order.rows or 24, columns=order.columns or 80) if order.rows else None
        self._reason: str | None = None
        self._ending = asyncio.Event()
        self._problem: str | None = None

    # What is said to it

    async def hear(self, msg: Msg) -> None:
        """A frame from a client. What cannot be understood is passed over."""
        try:
            frame = exec_frames.from_client(msg.data)
        except msgspec.DecodeError as error:
            log.info("exec %s: a frame that is none: %s", self.id, error)
            return
        await self._obey(frame)
        if msg.reply:
            try:
                await msg.respond(exec_frames.encode(self._buffer.credit()))
            except nats.errors.Error as error:
                log.debug("exec %s: %s", self.id, error)  # the client asks again

    async def _obey(self, frame: exec_frames.FromClient) -> None:
        match frame:
            case Data():
                if not self._buffer.put(frame.offset, frame.data):
                    self._client.tell(again=True)
            case End():
                self._client.tell(again=not self._buffer.end(frame.offset))
            case Ack():
                self._client.acknowledge(frame.client, frame.stdout + frame.stderr)
            case Attach():
                await self._client.attach(frame)
            case Leave():
                self._part(frame)
            case Resize():
                self._resize(frame)
            case Signal():
                self.signal(frame.number)

    def _part(self, frame: Leave) -> None:
        if frame.client == self._client.client and not frame.stay:
            self._hang_up()
        elif frame.client == self._client.client:
            self._client.leave()

    def _resize(self, frame: Resize) -> None:
        if self._size is not None:
            self._size = Terminal(rows=frame.rows, columns=frame.columns)
            if self._process is not None:
                self._process.resize(self._size)

    def signal(self, number: int) -> None:
        """Signal the main process; one that ends what has not begun ends it."""
        if self._process is not None:
            self._process.signal(number)
        elif number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL}:
            self._stop(f"it was sent {signal.Signals(number).name} before it began")

    def end(self, reason: str, grace: float) -> None:
        """End the whole tree."""
        self._stop(reason)
        if self._process is not None:
            self._cancel(self._process, grace)

    def _hang_up(self) -> None:
        if self._process is not None and self._size is not None:
            self._process.signal(signal.SIGHUP)  # shells heed no SIGTERM
        self.end("its client went away", HURRY)

    def _stop(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._client.leave()
        self._ending.set()

    def _cancel(self, process: Process, grace: float) -> None:
        task = asyncio.ensure_future(process.cancel(grace))
        task.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # the machine is gone: so is the process

    # What it does

    async def run(self) -> None:
        """Create it, see it to its end, and say how it ended."""
        if not await self._create():
            return
        minding = asyncio.create_task(self._client.run())
        pumping = asyncio.create_task(self._output.run())
        try:
            decide = await self._attempt()
        finally:
            minding.cancel()
            self._output.close()
        await pumping
        await self._log.transact(EXEC, self.scope, self.id, decide, known=self._position)

    async def _create(self) -> bool:
        """Append its first event. Only whoever has done that may start it: it is not executed twice, whoever asks how often."""
        try:
            self._position = await self._log.append(EXEC, self.scope, self.id, self._position, self._order.created)
        except HelmrError as error:
            self.created.set_exception(error)
            return False
        self._created_at = asyncio.get_running_loop().time()
        self.created.set_result(self._position.state)
        return True

    async def _attempt(self) -> Any:
        """Execute; returns the rule that says how it ended."""
        try:
            exited = await self._execute()
        except Misplaced as elsewhere:
            return _failing(f"the workspace has just come to life elsewhere (lane {elsewhere.lane}); try again")
        except _Settled:
            return lambda _: None
        except _Withdrawn:
            return _failing(self._reason or "it was ended before it began")
        except HelmrError as error:
            return _failing(f"{error.message} ({error.hint})" if error.hint else error.message)
        except OSError as error:
            return _failing(f"the workspace could not be used: {error}")
        if exited.cause in {"lost", "unknown"}:
            return lambda state: rules.lose(state, reason=f"what ran it was lost: {exited.detail}")
        return lambda state: rules.exit_(state, self._facts(exited))

    def _facts(self, exited: Exited) -> dict[str, Any]:
        facts: dict[str, Any] = {"exit_code": exited.exit_code, "signal": exited.signal, "cause": exited.cause}
        reason = self._reason or exited.detail or self._problem or None
        return facts | {"oom": exited.oom, "reason": reason, **self._output.totals}

    async def _execute(self) -> Exited:
        use = self._machines.use(self.scope, self._order.workspace, await self._needs())
        machine = await unless(self._ending, use.__aenter__())
        if machine is None:
            raise _Withdrawn
        try:
            if self._ending.is_set():
                raise _Withdrawn
            exited = await self._converse(await self._start(machine))
            if exited.cause != "lost":
                occasion = Occasion(f"the end of {self.id}")
                self._problem = await self._machines.capture(self.scope, self._order.workspace, occasion)
        except Unavailable as gone:
            await self._machines.forget(self.scope, self._order.workspace, machine, gone.message)
            raise
        finally:
            await use.__aexit__(None, None, None)
        return exited

    async def _start(self, machine: Machine) -> Process:
        """Start the process, and say so; before that, if bringing the workspace to life has taken a while.

        It may have been given up for lost meanwhile: then nothing of it may begin, or go on.
        """
        fresh = asyncio.get_running_loop().time() - self._created_at <= STALE
        saying = asyncio.create_task(self._say_started())
        try:
            if not fresh:
                await saying
            process = await machine.start(self._spec())
        except BaseException:
            await cancel_and_wait(saying)
            raise
        try:
            await saying
        except BaseException:
            await asyncio.shield(discard(process))
            raise
        return process

    async def _say_started(self) -> None:
        def start(state: ExecState) -> Draft:
            return rules.start(state, worker=self._worker_id)

        try:
            self._position = await self._log.transact(EXEC, self.scope, self.id, start, known=self._position)
        except Conflict as error:
            raise _Settled from error

    async def _needs(self) -> Needs:
        deployment = await self._deployments.load(self.scope, self._order.deployment)
        return Needs(
            deployment,
            find_sandbox(deployment, self._order.sandbox),
            lambda message: log.info("exec %s: %s", self.id, message),
        )

    async def _converse(self, process: Process) -> Exited:
        """Pass on what goes in and out until nothing of it is left."""
        self._process = process
        process.on_taken(self._note_taken)
        self._buffer.connect(process.feed, process.end_input)
        if self._size is not None:
            process.resize(self._size)
        if self._ending.is_set():
            await process.cancel(0)
        async for frame in process.frames():
            if isinstance(frame, Exited):
                return frame
            if isinstance(frame, Output):
                await self._output.write(frame.stream, frame.data)
                await self._client.has_room(lambda: sum(self._output.totals.values()))
        raise Unavailable("its process ended without a word")

    def _note_taken(self, size: int) -> None:
        self._buffer.taken = min(size, self._buffer.received)
        self._client.tell()

    def _spec(self) -> ProcessSpec:
        order = self._order
        return ProcessSpec(
            id=order.id,
            kind="argv" if order.transfer is None else "files",
            argv=order.argv,
            task=order.transfer or {},
            env={**order.env, "HELMR_EXEC_ID": order.id},
            cwd=order.cwd,
            input=order.input,
            terminal=self._size,
            grace=HURRY,
        )


def _failing(reason: str) -> Any:
    def decide(state: ExecState) -> Draft | None:
        return rules.fail(state, reason=reason)

    return decide
