"""What a task says while it runs, and what it is told: output to the log, events to the journal, answers to its questions."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from bus.bookmark import Bookmark, Frame
from bus.records import StreamWriter
from helmr.chunks import LogEnd
from helmr.errors import Conflict, UsageError
from helmr.events import Draft, RunSpec
from worker import messages
from worker.answers import Answers, append_record
from worker.engine import Exited, Message, Output, Process
from worker.hot import MAX_PARK_AFTER, HotRun, HotRuns
from worker.log_pump import LogPump
from worker.masking import Masker
from worker.outcome import Said
from worker.run_journal import RunJournal
from worker.stages import Stages
from worker.task_output import TaskOutput

log = logging.getLogger(__name__)

#: Part of the supervisor's window that may be taken by what would have to be repeated if this worker died.
_MOST_KEPT = 0.5


class Conversation:
    """One leased run's side of it; ``end`` ends the process when the task breaks the rules."""

    def __init__(
        self,
        answers: Answers,
        journal: RunJournal,
        pump: LogPump,
        writer: StreamWriter,
        *,
        stages: Stages,
        end: Callable[[], Awaitable[None]],
    ) -> None:
        self.said = Said()
        #: Whether the task's own code has begun.
        self.began = False
        #: Where an earlier worker has got to with the same execution, if this goes on with one.
        self.bookmark: Bookmark | None = None
        self.answers = answers
        self._journal = journal
        self._pump = pump
        self._writer = writer
        self._end = end
        self._stages = stages
        self._outputs: dict[str, TaskOutput] = {}
        self._process: Process | None = None
        #: The last frame that was acted on, and the first one of those that are needed again should this worker die.
        self._done = 0
        self._kept: int | None = None
        self._skip = 0  #: bytes of log lines that are stored already

    async def listen(self, running: HotRun, hot: HotRuns, masker: Masker) -> Exited | None:
        """Carry what the process says, without secrets, until its end. None: the run waits, and ``hot`` has its process.

        Raises:
            Torn: something it said was lost with an earlier worker.
        """
        process = self._process = running.process
        process.settle_by_hand()
        self._done = process.at
        ends = self._begin(running)
        self._outputs = {
            name: TaskOutput(self._pump, name, masker.stream(), ends.get(name)) for name in ("stdout", "stderr")
        }
        async for frame in process.frames():
            match frame:
                case Output():
                    await self._outputs[frame.stream].take(frame, process.at)
                case Message():
                    self._journal.frame = Frame(running.execution, process.at)
                    body = messages.masked(frame.body, masker)
                    if body.get("op") == "wait" and not self._told(process.at):
                        await self._write_rest()
                    if await self._heed(body, running, hot):
                        return None
                case Exited():
                    await self._write_rest()
                    return frame
            self._done = process.at
            self.settle()
        return Exited(cause="lost", detail="the process ended without a word")

    def _begin(self, running: HotRun) -> Mapping[str, LogEnd]:
        """Where the streams of the log go on: where an earlier worker left them, or with what comes next."""
        self._pump.execution = running.execution
        if self.bookmark is not None:
            self._skip = self.bookmark.log["log"].skip
            self._pump.begin(self.bookmark.log, truncated=self.bookmark.truncated, landed=self.bookmark.landed)
            return self.bookmark.log
        if running.process.at:
            self._pump.begin({"log": LogEnd(running.process.at)}, landed=running.landed)
        return {}

    def settle(self) -> None:
        """Tell the supervisor what nobody will need again, whoever dies when: what it has not been told comes again."""
        process = self._process
        if process is None:
            return
        if process.backlog > _MOST_KEPT:
            self._let_go()
        held = [output.holds for output in self._outputs.values()]
        needed = [frame for frame in (self._pump.oldest, self._journal.oldest, self._kept, *held) if frame is not None]
        process.settle(min([self._done + 1, *needed]) - 1)

    def forget(self) -> None:
        """The run has ended, or is somebody else's: the supervisor may forget the process."""
        if self._process is not None:
            self._process.settle(self._process.at)

    def _let_go(self) -> None:
        """Keep back no longer what would have to be repeated: the process must not wait for it. Its log says so before."""
        if self._kept is not None:
            self._kept = None
            self._pump.spoil()
        for output in self._outputs.values():
            output.holds = None  # should this be missed, a successor will notice the gap

    def _told(self, frame: int) -> bool:
        """Whether what came of a frame is in the log already."""
        return self.bookmark is not None and frame <= self.bookmark.events

    async def _write_rest(self) -> None:
        for output in self._outputs.values():
            await output.finish(self._journal.frame.number)

    async def _heed(self, body: dict[str, Any], running: HotRun, hot: HotRuns) -> bool:
        """Act on one message of the task, unless it has broken the protocol before; whether the run waits now."""
        if self.said.broken is not None:
            return False
        process = running.process
        try:
            message = messages.parse(body)
            if isinstance(message, messages.Wait):
                return await self._heed_wait(message, hot, running)
            if isinstance(message, messages.Question):
                await process.send(await self.answers.answer(message, told=self._told(process.at)))
            else:
                await self._act(message, process.at)
        except (messages.Broken, UsageError) as error:
            self.said.broken = error.message
            await self._end()
        except Conflict as ended:  # it asks, and does not live to hear the answer
            log.debug("process %s: %s", process.id, ended)
        return False

    async def _heed_wait(self, message: messages.Wait, hot: HotRuns, running: HotRun) -> bool:
        if not self._told(running.process.at):
            return await self._wait(message, hot, running)
        if self.bookmark is not None and running.process.at == self.bookmark.waiting:
            # It is over, since the run is leased; whether the task has heard of that nobody knows, and twice does no harm.
            await self.answers.tell(running.process, message.id)
        return False

    async def _wait(self, message: messages.Wait, hot: HotRuns, waiting: HotRun) -> bool:
        """Have the run wait. Its process is kept before the log says so: the answer may come at once."""
        await self._pump.drain()
        await self._journal.flush()
        await waiting.process.limit(2 * MAX_PARK_AFTER, waiting.spec.cancel_grace)
        waiting.question = message.id
        waiting.landed = self._pump.landed
        waiting.park_at = asyncio.get_running_loop().time() + min(waiting.spec.park_after, MAX_PARK_AFTER)
        hot.keep(waiting)
        try:
            registered = await self.answers.register(message)
        except BaseException:
            hot.take(waiting.run_id)
            raise
        if not registered:
            hot.take(waiting.run_id)
        return registered

    async def _act(self, message: messages.Statement, frame: int) -> None:
        match message:
            case messages.LogLine():
                await self._log(message, frame)
            case messages.Result() | messages.ResultPart() | messages.Error():
                self._kept = self._kept or frame
                self.said.hear(message)
            case _ if self._told(frame):
                self.began = self.began or isinstance(message, messages.Started)
            case messages.Started():
                self.began = True
                self._stages.over("process")
                taken: dict[str, Any] = {"stages": self._stages.seconds()}
                begins = Draft(kind="started", data=taken, message="the task's code begins", source="worker")
                await self._journal.put(begins)
            case messages.Metadata(metadata=document, changed=changed, n=n):
                data = {"metadata": document, "changed": changed, "n": n}
                await self._journal.put(Draft(kind="metadata", data=data, source="task"))
            case messages.Record():
                await append_record(message, self._writer, self._journal)

    async def _log(self, message: messages.LogLine, frame: int) -> None:
        end = self.bookmark.log["log"] if self.bookmark is not None else None
        if end is not None and frame <= end.position:
            return
        fields = msgspec.to_builtins(message)
        del fields["op"]
        line = msgspec.json.encode(fields) + b"\n"
        skipped, self._skip = min(self._skip, len(line)), max(self._skip - len(line), 0)
        await self._pump.write("log", line[skipped:], position=frame, lag=self._skip, frame=frame)


def patient_writer(answers: Answers, spec: RunSpec, journal: RunJournal) -> StreamWriter:
    """The writer of a run's output streams; it waits for the server for as long as it takes."""
    return StreamWriter(
        answers.log.js,
        answers.scope,
        spec.session_id,
        answers.run_id,
        patience=math.inf,
        look_back=journal.executed_before,
        confirm=journal.check,
    )
