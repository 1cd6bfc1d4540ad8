"""Log chunks: the bytes a run wrote, and how they are stored and read back.

A chunk is one message in LOGS: raw bytes of one stream (for ``log``: JSON lines), with its byte offset in that stream of that
dispatch, so that readers can tell a gap from a repeat. A tombstone is an empty chunk that says why a stream ends early.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from bus import topology
from helmr import events, subjects
from helmr.errors import Unavailable
from helmr.subjects import Scope

#: Why a stream ends before its process did: the log limit was reached, or the worker was lost.
TRUNCATED, WORKER_LOST = "truncated", "worker_lost"


class LogChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one stream; ``seq`` orders the chunks of a run over all its streams."""

    seq: int
    attempt: int
    dispatch: int
    stream: str
    offset: int
    at: datetime
    data: bytes
    tombstone: str | None = None


def headers(*, offset: int, dispatch: int, at: datetime, tombstone: str | None = None) -> dict[str, str]:
    """The headers of a chunk."""
    fields = {
        topology.HEADER_OFFSET: str(offset),
        topology.HEADER_DISPATCH: str(dispatch),
        topology.HEADER_AT: at.isoformat(),
    }
    return fields | ({topology.HEADER_TOMBSTONE: tombstone} if tombstone else {})


def message_id(run_id: str, attempt: int, dispatch: int, stream: str, offset: int) -> str:
    """What makes a repeated publish of one chunk recognisable to the server."""
    return f"{run_id}.{attempt}.{dispatch}.{stream}.{offset}"


def parse(subject: str, fields: dict[str, str], data: bytes, *, seq: int) -> LogChunk:
    """The chunk of a stored (or live) message."""
    place = subjects.parse_log(subject)
    return LogChunk(
        seq=seq,
        attempt=place.attempt,
        dispatch=int(fields[topology.HEADER_DISPATCH]),
        stream=place.stream,
        offset=int(fields[topology.HEADER_OFFSET]),
        at=datetime.fromisoformat(fields[topology.HEADER_AT]),
        data=data,
        tombstone=fields.get(topology.HEADER_TOMBSTONE),
    )


async def bury(js: JetStreamContext, scope: Scope, run_id: str, *, attempt: int, dispatch: int) -> None:
    """Say in a run's log, on behalf of a worker that no longer can, that its output ends there; twice is as good as once.

    Raises:
        Unavailable: NATS does not answer.
    """
    fields = headers(offset=0, dispatch=dispatch, at=events.now(), tombstone=WORKER_LOST)
    fields["Nats-Msg-Id"] = message_id(run_id, attempt, dispatch, "lost", 0)
    try:
        await js.publish(subjects.log(scope, run_id, attempt, "log"), b"", headers=fields)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS does not answer: {type(error).__name__} {error}") from error


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
    found: list[LogChunk] = []
    size = 0
    while size < limit:
        message = await _next(js, wanted, after)
        if message is None:
            return found, False
        after = message.seq or 0
        chunk = parse(message.subject or "", message.headers or {}, message.data or b"", seq=after)
        found.append(chunk)
        size += len(chunk.data) + 200
    return found, True


async def _next(js: JetStreamContext, wanted: str, after: int) -> RawStreamMsg | None:
    try:
        message: Any = await js.get_msg(topology.LOGS, seq=after + 1, subject=wanted, direct=True, next=True)
    except nats.js.errors.NotFoundError:
        return None
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS does not answer: {type(error).__name__} {error}") from error
    found: RawStreamMsg = message
    return found
