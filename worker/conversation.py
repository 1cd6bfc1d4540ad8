"""What a task says while it runs, and what it is told: output to the log, events to the journal, answers to its questions."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from bus.records import StreamWriter
from helmr.errors import Conflict, UsageError
from helmr.events import Draft, RunSpec
from worker import messages
from worker.answers import Answers, append_record
from worker.engine import Exited, Message, Output
from worker.hot import MAX_PARK_AFTER, HotRun, HotRuns
from worker.log_pump import LogPump
from worker.masking import MaskedStream, Masker
from worker.outcome import Said
from worker.run_journal import RunJournal
from worker.stages import Stages

log = logging.getLogger(__name__)


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
        self._answers = answers
        self._journal = journal
        self._pump = pump
        self._writer = writer
        self._end = end
        self._stages = stages

    async def listen(self, running: HotRun, hot: HotRuns, masker: Masker) -> Exited | None:
        """Carry what the process says, without secrets, until its end. None: the run waits, and ``hot`` has its process."""
        streams = {"stdout": masker.stream(), "stderr": masker.stream()}
        async for frame in running.process.frames():
            match frame:
                case Output():
                    await self._pump.write(frame.stream, streams[frame.stream].feed(frame.data))
                case Message():
                    body = messages.masked(frame.body, masker)
                    if body.get("op") == "wait":
                        await self._write_rest(streams)
                    if await self._heed(body, running, hot):
                        return None
                case Exited():
                    await self._write_rest(streams)
                    return frame
        return Exited(cause="lost", detail="the process ended without a word")

    async def _write_rest(self, streams: dict[str, MaskedStream]) -> None:
        for name, stream in streams.items():
            await self._pump.write(name, stream.end())

    async def _heed(self, body: dict[str, Any], running: HotRun, hot: HotRuns) -> bool:
        """Act on one message of the task, unless it has broken the protocol before; whether the run waits now."""
        if self.said.broken is not None:
            return False
        process = running.process
        try:
            message = messages.parse(body)
            if isinstance(message, messages.Wait):
                return await self._wait(message, hot, running)
            if isinstance(message, messages.Question):
                await process.send(await self._answers.answer(message))
            else:
                await self._act(message)
        except (messages.Broken, UsageError) as error:
            self.said.broken = error.message
            await self._end()
        except Conflict as ended:  # it asks, and does not live to hear the answer
            log.debug("process %s: %s", process.id, ended)
        return False

    async def _wait(self, message: messages.Wait, hot: HotRuns, waiting: HotRun) -> bool:
        """Have the run wait. Its process is kept before the log says so: the answer may come at once."""
        await self._pump.drain()
        await self._journal.flush()
        await waiting.process.limit(2 * MAX_PARK_AFTER, waiting.spec.cancel_grace)
        waiting.question = message.id
        waiting.park_at = asyncio.get_running_loop().time() + min(waiting.spec.park_after, MAX_PARK_AFTER)
        hot.keep(waiting)
        try:
            registered = await self._answers.register(message)
        except BaseException:
            hot.take(waiting.run_id)
            raise
        if not registered:
            hot.take(waiting.run_id)
        return registered

    async def _act(self, message: messages.Statement) -> None:
        match message:
            case messages.Started():
                self.began = True
                self._stages.over("process")
                taken: dict[str, Any] = {"stages": self._stages.seconds()}
                begins = Draft(kind="started", data=taken, message="the task's code begins", source="worker")
                await self._journal.put(begins)
            case messages.LogLine():
                fields = msgspec.to_builtins(message)
                del fields["op"]
                await self._pump.write("log", msgspec.json.encode(fields) + b"\n")
            case messages.Metadata(metadata=document, changed=changed, n=n):
                data = {"metadata": document, "changed": changed, "n": n}
                await self._journal.put(Draft(kind="metadata", data=data, source="task"))
            case messages.Record():
                await append_record(message, self._writer, self._journal)
            case messages.Result() | messages.ResultPart() | messages.Error():
                self.said.hear(message)


def patient_writer(answers: Answers, spec: RunSpec, journal: RunJournal, *, executed_before: bool) -> StreamWriter:
    """The writer of a run's output streams; it waits for the server for as long as it takes."""
    return StreamWriter(
        answers.log.js,
        answers.scope,
        spec.session_id,
        answers.run_id,
        patience=math.inf,
        look_back=executed_before,
        confirm=journal.check,
    )
