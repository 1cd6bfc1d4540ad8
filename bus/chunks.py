"""Reads log chunks back from the log stream, and ends a log on behalf of a worker that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from bus import topology
from bus.log import Log
from bus.stored import stored_message
from helmr import events, subjects
from helmr.chunks import HEADER_MARK, HEADER_OFFSET, WORKER_LOST, LogChunk, Mark, headers, message_id, parse
from helmr.subjects import Scope

#: What a chunk counts for beside its bytes.
_OVERHEAD = 200


class _Chunk(Protocol):
    @property
    def data(self) -> bytes: ...


C = TypeVar("C", bound=_Chunk)


async def bury(log: Log, scope: Scope, run_id: str, *, attempt: int, dispatch: int) -> None:
    """Say in a run's log, on behalf of a worker that no longer can, that its output ends there; twice is as good as once.

    Raises:
        Unavailable: NATS stayed away.
    """
    subject = subjects.log(scope, run_id, attempt, "log")
    last = await stored_message(log.js, topology.LOGS, subject)
    end, mark = _reached(last) if last is not None else (0, None)
    fields = headers(offset=end, dispatch=dispatch, at=events.now(), tombstone=WORKER_LOST, mark=mark)
    fields["Nats-Msg-Id"] = message_id(run_id, attempt, dispatch, "lost", 0)
    await log.store(subject, b"", fields)


def _reached(last: RawStreamMsg) -> tuple[int, Mark | None]:
    """Where a stream ends, and its last mark: should the execution go on all the same, it is found at the end."""
    fields = last.headers or {}
    end = int(fields[HEADER_OFFSET]) + len(last.data or b"")
    return end, Mark.parse(fields[HEADER_MARK]) if HEADER_MARK in fields else None


async def read_chunks(
    js: JetStreamContext,
    scope: Scope,
    run_id: str,
    *,
    attempt: int | None,
    stream: str | None,
    after: int,
    limit: int,
) -> tuple[list[LogChunk], bool]:
    """Stored chunks beyond sequence ``after``, some ``limit`` bytes of them, and whether there may be more."""
    wanted = subjects.log(scope, run_id, attempt if attempt is not None else "*", stream or "*")
    return await read_page(js, topology.LOGS, wanted, _parse, after=after, limit=limit)


def _parse(message: RawStreamMsg) -> LogChunk:
    return parse(message.subject or "", message.headers or {}, message.data or b"", seq=message.seq or 0)


async def read_page(
    js: JetStreamContext, stream: str, wanted: str, parse_: Callable[[RawStreamMsg], C], *, after: int, limit: int
) -> tuple[list[C], bool]:
    """Messages of ``stream`` under a filter beyond sequence ``after``, some ``limit`` bytes, and whether there may be more.

    Raises:
        Unavailable: NATS does not answer.
    """
    found: list[C] = []
    size = 0
    while size < limit:
        message = await stored_message(js, stream, wanted, after=after)
        if message is None:
            return found, False
        after = message.seq or 0
        chunk = parse_(message)
        found.append(chunk)
        size += len(chunk.data) + _OVERHEAD
    return found, True
