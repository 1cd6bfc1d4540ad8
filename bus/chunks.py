"""Reads log chunks back from the log stream, and ends a log on behalf of a worker that is gone."""

from __future__ import annotations

from typing import Any

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from bus import topology
from helmr import events, subjects
from helmr.chunks import WORKER_LOST, LogChunk, headers, message_id, parse
from helmr.errors import Unavailable
from helmr.subjects import Scope


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
        message = await next_message(js, topology.LOGS, wanted, after)
        if message is None:
            return found, False
        after = message.seq or 0
        chunk = parse(message.subject or "", message.headers or {}, message.data or b"", seq=after)
        found.append(chunk)
        size += len(chunk.data) + 200
    return found, True


async def next_message(js: JetStreamContext, stream: str, wanted: str, after: int) -> RawStreamMsg | None:
    """The first message of ``stream`` under the filter ``wanted`` beyond sequence ``after``; None if there is none.

    Raises:
        Unavailable: NATS does not answer.
    """
    try:
        message: Any = await js.get_msg(stream, seq=after + 1, subject=wanted, direct=True, next=True)
    except nats.js.errors.NotFoundError:
        return None
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS does not answer: {type(error).__name__} {error}") from error
    found: RawStreamMsg = message
    return found
