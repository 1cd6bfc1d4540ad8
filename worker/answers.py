"""Answers what a task asks of its run (to record a step, for a token or a secret, what a stream holds), and registers waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from bus import timers, tokens, waits
from bus.log import RUN, Log
from bus.records import StreamWriter
from helmr import events, ids, subjects
from helmr.errors import Conflict, NotFound
from helmr.events import Draft, RunSpec, Wait
from helmr.reducers import journal as journal_rules
from helmr.reducers import run as rules
from helmr.reducers.journal import Recorded
from helmr.subjects import Scope
from worker import messages
from worker.engine import Process
from worker.run_journal import RunJournal

Answer = dict[str, Any]
#: Events of a run that are read to know what is recorded: all.
_ALL = 1_000_000_000


class Answers:
    """The answers for one leased run."""

    def __init__(self, log: Log, scope: Scope, run_id: str, spec: RunSpec, journal: RunJournal) -> None:
        self.log = log
        self.scope = scope
        self.run_id = run_id
        self._spec = spec
        self._journal = journal
        self._told = False

    async def answer(self, question: messages.Question, *, told: bool = False) -> Answer:
        """What to tell the task; an error that is the task's to know of is part of the answer, under ``failed``.

        ``told``: what comes of it is in the log already, by a worker that may not have lived to answer.
        """
        self._told = told
        return await self._find(question) | {"op": "answer", "id": question.id}

    async def tell(self, process: Process, question: int) -> None:
        """Tell a task what came of the wait that it asked for with ``question``.

        Raises:
            Conflict: it has ended.
        """
        ended = await waits.outcome(self.log, self.scope, self.run_id)
        await process.send(journal_rules.outcome(ended) | {"op": "answer", "id": question})

    async def _find(self, question: messages.Question) -> Answer:
        match question:
            case messages.Peek() if self._told:
                return await self._recorded_peek(question)
            case messages.StepOver():
                return await self._record(question)
            case messages.Peek():
                return await self._peek(question)
            case messages.NewToken():
                return await self._token(question)
            case messages.NewSecret():
                return await self._secret(question)

    async def _append(self, kind: str, data: dict[str, Any], message: str) -> None:
        """Have an event appended, after those put before it, and wait until it is."""
        if self._told:
            return
        await self._journal.put(Draft(kind=kind, data=data, message=message, source="task"))
        await self._journal.flush()

    async def _record(self, step: messages.StepOver) -> Answer:
        data = _key(step) | {"call": step.call}
        data |= {"error": step.error} if step.error is not None else {"result": step.result}
        if step.metadata is not None:
            data["metadata"] = step.metadata
        message = f"{step.call} {step.name}".rstrip() + (" failed" if step.error else "")
        await self._append("step", data, message)
        return {}

    async def _peek(self, look: messages.Peek) -> Answer:
        await self._journal.flush()
        state = self._journal.state
        stored = await waits.next_record(self.log, self.scope, state, look.stream, look.correlation_id)
        answer = {"found": stored is not None, "result": stored.record.data if stored else None}
        await self._append("step", _key(look) | {"call": "peek", **answer}, f"peek {look.name}")
        return answer

    async def recorded(self) -> Recorded:
        """What is in the log of the executions of this attempt so far."""
        found = await self.log.events(RUN, self.scope, self.run_id, limit=_ALL)
        return journal_rules.recorded(found, attempt=self._journal.state.attempt or 1)

    async def _recorded_peek(self, look: messages.Peek) -> Answer:
        entries = (await self.recorded()).entries
        found = next(
            each for each in reversed(entries) if each["kind"] == "peek" and _key(look).items() <= each.items()
        )
        return {"found": found["found"], "result": found["result"]}

    async def _token(self, wanted: messages.NewToken) -> Answer:
        place = f"{wanted.n}{'' if wanted.main else '-aside'}"
        token_id = ids.derive("tok", *self.scope, self.run_id, place, at_ms=ids.time_ms(self.run_id))
        made = await tokens.create(
            self.log,
            self.scope,
            token_id,
            timeout=wanted.timeout,
            tags=wanted.tags,
            metadata=wanted.metadata,
            run_id=self.run_id,
            session_id=self._spec.session_id,
        )
        told = {"token": token_id, "expires_at": made.event.state.expires_at.isoformat()}
        await self._append("token_created", _key(wanted) | told, f"token {token_id}")
        return told

    async def _secret(self, wanted: messages.NewSecret) -> Answer:
        try:
            return {"secret": await tokens.add_secret(self.log, self.scope, wanted.token)}
        except (NotFound, Conflict) as error:
            return {"failed": error.to_dict()}

    async def register(self, wanted: messages.Wait, **data: Any) -> bool:
        """Have the run wait: its lease ends. False: somebody wants its end, and the task's with it."""
        due = wanted.due
        if wanted.timeout is not None:
            due = events.now() + timedelta(seconds=wanted.timeout)
        wait = Wait(
            kind=wanted.kind,
            name=wanted.name,
            stream=wanted.stream,
            token=wanted.token,
            correlation_id=wanted.correlation_id,
            due=due,
        )
        await self._journal.flush()
        await self._prepare(wait)
        try:
            await self._journal.append(lambda s: rules.wait(s, wait, n=wanted.n, main=wanted.main, **data))
        except Conflict:
            return False
        self._journal.release()
        return True

    async def _prepare(self, wait: Wait) -> None:
        """What has to be there before the run waits."""
        if wait.stream is not None:
            subjects.io(self.scope, self._spec.session_id, "in", wait.stream)  # refuses what is no name
        if wait.token is not None:
            await tokens.await_token(self.log, self.scope, wait.token, self.run_id)
        if wait.due is not None:
            await timers.arm(self.log, self.scope, self.run_id, waits.TIMER, wait.due)


def _key(message: messages.StepOver | messages.Peek | messages.NewToken) -> dict[str, Any]:
    return {"name": message.name, "n": message.n, "main": message.main}


async def append_record(message: messages.Record, writer: StreamWriter, journal: RunJournal) -> None:
    """Store a record for an output stream, and say so in the run's log."""
    # Without a number of its own, that of the frame will do: it must be recognised should it be said to another worker again.
    at = f"frame-{journal.frame.execution}-{journal.frame.number}"
    number = at if message.n is None else f"{message.n}{'' if message.main else '-aside'}"
    record = await writer.append(message.stream, message.data, message.correlation_id, number=number)
    told: dict[str, Any] = {"stream": record.stream, "sequence": record.sequence, "record_id": record.id}
    if message.n is not None:
        told |= {"n": message.n, "main": message.main}
    await journal.put(Draft(kind="output", data=told, source="task"))
