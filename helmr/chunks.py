"""What a log chunk is: the bytes a run wrote and the headers they travel with, the same for who writes, stores and reads them.

A chunk is one message in LOGS: raw bytes of one stream (for ``log``: JSON lines), with its byte offset in that stream of that
dispatch, so that readers can tell a gap from a repeat. A tombstone is an empty chunk that says why a stream ends early.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from helmr import subjects

#: Why a stream ends before its process did: the log limit was reached, or the worker was lost.
TRUNCATED, WORKER_LOST = "truncated", "worker_lost"

HEADER_OFFSET = "Helmr-Offset"
HEADER_DISPATCH = "Helmr-Dispatch"
HEADER_AT = "Helmr-At"
HEADER_TOMBSTONE = "Helmr-Tombstone"


class LogChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one stream (``stdout``, ``stderr``, or ``log``: JSON lines); ``tombstone`` says why a stream ends early.

    ``seq`` orders the stored chunks of a run over all its streams; a live one has 0.
    """

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
    fields = {HEADER_OFFSET: str(offset), HEADER_DISPATCH: str(dispatch), HEADER_AT: at.isoformat()}
    return fields | ({HEADER_TOMBSTONE: tombstone} if tombstone else {})


def message_id(run_id: str, attempt: int, dispatch: int, stream: str, offset: int) -> str:
    """What makes a repeated publish of one chunk recognisable to the server."""
    return f"{run_id}.{attempt}.{dispatch}.{stream}.{offset}"


def parse(subject: str, fields: dict[str, str], data: bytes, *, seq: int = 0) -> LogChunk:
    """The chunk of a stored (or, without ``seq``, live) message."""
    place = subjects.parse_log(subject)
    return LogChunk(
        seq=seq,
        attempt=place.attempt,
        dispatch=int(fields[HEADER_DISPATCH]),
        stream=place.stream,
        offset=int(fields[HEADER_OFFSET]),
        at=datetime.fromisoformat(fields[HEADER_AT]),
        data=data,
        tombstone=fields.get(HEADER_TOMBSTONE),
    )
