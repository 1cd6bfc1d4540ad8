"""Where the execution of a run has got to, as far as that is stored: for a worker that goes on with it when another one died.

The supervisor sends everything again that nobody has acknowledged, and a good deal of that has been acted on. Every event that
came of something the process said names the frame in a header, every log chunk has a mark (:class:`helmr.chunks.Mark`). Both
are written in the order of the frames, so that the last ones tell how far it got. The lease, which is the reader's by then,
keeps the dead one from adding events; that it adds no chunks :func:`silence` has to make sure before.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from bus import topology
from bus.stored import publish, stored_message
from helmr import chunks, events, subjects
from helmr.chunks import TRUNCATED, WORKER_LOST, LogEnd, Mark
from helmr.subjects import Scope

HEADER_FRAME = "Helmr-Frame"
STREAMS = ("stdout", "stderr", "log")
#: Seconds between questions whether the server has noticed that a dead worker's connection is gone, and for how long.
_ASK_AGAIN, _PATIENCE = 0.05, 8.0
#: Seconds for an answer.
_TIMEOUT = 2.0
#: Chunks that are looked at for a gap: there are some ten, unless nobody knows from where on to look.
_MOST = 500


class Frame(NamedTuple):
    """A frame of a process by its number, and the cursor of the lease under which the process was started; 0: none."""

    execution: int
    number: int

    def headers(self) -> dict[str, str] | None:
        """What an event says that came of it."""
        return {HEADER_FRAME: f"{self.execution} {self.number}"} if self.execution else None


class Bookmark(NamedTuple):
    """How far an execution has got: what its process said up to these frames and positions is stored.

    ``events`` and ``waiting`` are the frames of its last event and of its last wait; ``began``: the task's code has begun.
    """

    events: int = 0
    waiting: int = 0
    began: bool = False
    log: Mapping[str, LogEnd] = dict.fromkeys(STREAMS, LogEnd())
    truncated: frozenset[str] = frozenset()  #: streams that are stored no further
    landed: int = 0  #: LOGS has everything up to here


class Torn(Exception):
    """What is stored of an execution does not tell how far it got, so that nobody can go on with it."""


async def silence(nc: Nats, worker: str) -> None:
    """Wait until the server has heard all that a dead worker has said: its connection is gone.

    Raises:
        Torn: it stays, and something may still be on its way.
    """
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while asyncio.get_running_loop().time() < deadline:
        try:
            await nc.request(subjects.worker(worker, "ping"), timeout=_TIMEOUT)
        except nats.errors.NoRespondersError:
            return
        except (TimeoutError, nats.errors.Error):
            pass  # nobody is there to answer, and the server has not noticed, or is away itself
        await asyncio.sleep(_ASK_AGAIN)
    raise Torn(f"the connection of worker {worker} is still there")


async def find(
    js: JetStreamContext, scope: Scope, run_id: str, *, execution: int, attempt: int, dispatch: int
) -> Bookmark:
    """How far an execution has got, for the holder of the dispatch that goes on with it.

    Raises:
        Torn: that cannot be told.
        Unavailable: NATS does not answer.
    """
    started, journal, waiting = [
        await _frame(js, subjects.event(scope, "run", run_id, kind), execution)
        for kind in ("started", "step", "waiting")
    ]
    ends = await _chunks(js, scope, run_id, execution=execution, attempt=attempt, dispatch=dispatch)
    known = {stream: end for stream, (end, _) in ends.found.items()}
    return Bookmark(
        events=max(started, journal, waiting),
        waiting=waiting,
        began=started > 0,
        log={stream: known.get(stream, LogEnd()) for stream in STREAMS},
        truncated=frozenset(stream for stream, (_, why) in ends.found.items() if why == TRUNCATED),
        landed=ends.barrier,
    )


async def waited(js: JetStreamContext, scope: Scope, run_id: str, execution: int) -> int:
    """The frame with which an execution began its last wait; 0: it has not waited, or an earlier version of Helmr wrote it."""
    return await _frame(js, subjects.event(scope, "run", run_id, "waiting"), execution)


async def _frame(js: JetStreamContext, subject: str, execution: int) -> int:
    """The frame that the last event of a kind came of; 0: of none of this execution."""
    message = await stored_message(js, topology.RUNS, subject)
    told = (message.headers or {}).get(HEADER_FRAME) if message is not None else None
    theirs, number = map(int, told.split()) if told else (0, 0)
    return number if theirs == execution else 0


class _Ends(NamedTuple):
    """The end of each stream, with why it ends there, if it does; and the message that was stored after all of them."""

    found: dict[str, tuple[LogEnd, str | None]]
    barrier: int


async def _chunks(
    js: JetStreamContext, scope: Scope, run_id: str, *, execution: int, attempt: int, dispatch: int
) -> _Ends:
    wanted = [subjects.log(scope, run_id, attempt, stream) for stream in STREAMS]
    earlier = await stored_message(js, topology.LOGS, wanted[-1])
    barrier = await _put_barrier(js, wanted[-1], run_id, attempt, dispatch)
    last = [await stored_message(js, topology.LOGS, subject) for subject in wanted[:-1]]
    # Behind what was the last of this one, and before the barrier, there may be chunks that were just being stored.
    last.append(await _last_before(js, wanted[-1], earlier, barrier))
    ours = {}
    for stream, subject, latest in zip(STREAMS, wanted, last, strict=True):
        foreign = latest is not None and _mark(latest).execution not in {execution, 0}
        message = await _last_of(js, subject, execution, barrier) if foreign else latest
        if message is not None and not _is_grave(message):
            ours[stream] = (message, _mark(message))
    if not all(mark.execution and mark.whole for _, mark in ours.values()):
        raise Torn("its worker knew what stands nowhere else")
    if ours:
        await _check(js, subjects.log(scope, run_id, attempt, "*"), list(ours.values()), barrier)
    return _Ends({stream: _end(message, mark) for stream, (message, mark) in ours.items()}, barrier)


async def _put_barrier(js: JetStreamContext, subject: str, run_id: str, attempt: int, dispatch: int) -> int:
    """Store a chunk of nothing: whatever the server had taken in before it is stored before it, and can be read."""
    fields = chunks.headers(offset=0, dispatch=dispatch, at=events.now())
    fields["Nats-Msg-Id"] = chunks.message_id(run_id, attempt, dispatch, "barrier", 0)
    return await publish(js, subject, b"", fields)


async def _stored(
    js: JetStreamContext, subject: str, *, after: int, before: int, most: float = math.inf
) -> AsyncIterator[RawStreamMsg]:
    """The messages under a subject between two sequences, oldest first.

    Raises:
        Torn: there may be more than ``most`` of them.
    """
    count = 0
    while count < most:
        message = await stored_message(js, topology.LOGS, subject, after=after)
        if message is None or (message.seq or 0) >= before:
            return
        yield message
        after = message.seq or 0
        count += 1
    raise Torn("what it wrote last is too far back to be looked through")


async def _last_before(
    js: JetStreamContext, subject: str, known: RawStreamMsg | None, barrier: int
) -> RawStreamMsg | None:
    """The last message under a subject before a sequence; ``known`` was the last one a moment before."""
    async for message in _stored(js, subject, after=(known.seq or 0) if known else 0, before=barrier):
        known = message
    return known


async def _last_of(js: JetStreamContext, subject: str, execution: int, barrier: int) -> RawStreamMsg | None:
    """The last message of an execution before a sequence, though there is one of another execution behind it.

    Ours has said nothing here, then; or the other one is an earlier one, whose worker was stopped for a while, and stored what
    it had before it heard that the run is not its own any more.
    """
    found = None
    async for message in _stored(js, subject, after=0, before=barrier, most=_MOST):
        found = message if _mark(message).execution == execution else found
    return found


async def _check(js: JetStreamContext, subject: str, ours: list[tuple[RawStreamMsg, Mark]], barrier: int) -> None:
    """Make sure that no chunk of the latest dispatch is missing: one may have been lost, and later ones not."""
    dispatch = max(_dispatch(message) for message, _ in ours)
    latest = max((mark for message, mark in ours if _dispatch(message) == dispatch), key=lambda mark: mark.number)
    numbers: set[int] = set()
    first = 1
    async for message in _stored(js, subject, after=max(latest.landed - 1, 0), before=barrier, most=_MOST):
        if _dispatch(message) == dispatch:
            numbers.add(_mark(message).number)
            first = _mark(message).number if message.seq == latest.landed else first
    if not numbers >= set(range(first, latest.number + 1)):
        raise Torn("a part of what it wrote was lost with its worker")


def _is_grave(message: RawStreamMsg) -> bool:
    """Whether somebody has said of an empty log that its worker was lost (:func:`bus.chunks.bury`): there is nothing in it."""
    fields = message.headers or {}
    lost = fields.get(chunks.HEADER_TOMBSTONE) == WORKER_LOST and chunks.HEADER_MARK not in fields
    return lost and fields.get(chunks.HEADER_OFFSET) == "0"


def _mark(message: RawStreamMsg) -> Mark:
    text = (message.headers or {}).get(chunks.HEADER_MARK)
    return Mark.parse(text) if text else Mark(execution=0, position=0, offset=0, number=0, landed=0)


def _dispatch(message: RawStreamMsg) -> int:
    return int((message.headers or {})[chunks.HEADER_DISPATCH])


def _end(message: RawStreamMsg, mark: Mark) -> tuple[LogEnd, str | None]:
    fields = message.headers or {}
    end = int(fields[chunks.HEADER_OFFSET]) + len(message.data or b"")
    return LogEnd(mark.position, end - mark.offset), fields.get(chunks.HEADER_TOMBSTONE)
