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
HEADER_MARK = "Helmr-Mark"


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


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """How far an execution had got when a chunk was made, for a worker that goes on with it after the death of this one.

    ``execution`` is the cursor of the lease under which its process was started. What the process had said up to ``position``
    (of ``stdout`` and ``stderr``: bytes that it wrote; of ``log``: frames of its channel) makes up this stream of this dispatch
    up to byte ``offset``. ``number`` counts the chunks of the dispatch; all up to the one that LOGS holds at ``landed`` were
    stored by then (0: nobody knows). ``whole``: a successor needs nothing that this worker alone remembers.
    """

    execution: int
    position: int
    offset: int
    number: int
    landed: int
    whole: bool = True

    def __str__(self) -> str:
        words = (self.execution, self.position, self.offset, self.number, self.landed, int(self.whole))
        return " ".join(map(str, words))

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The mark that was written like this."""
        execution, position, offset, number, landed, whole = map(int, text.split())
        return cls(
            execution=execution, position=position, offset=offset, number=number, landed=landed, whole=bool(whole)
        )


class LogEnd(msgspec.Struct, frozen=True):
    """Where a stream of the log goes on: after a mark's ``position``, without the ``skip`` bytes that are stored already."""

    position: int = 0
    skip: int = 0


def headers(
    *, offset: int, dispatch: int, at: datetime, tombstone: str | None = None, mark: Mark | None = None
) -> dict[str, str]:
    """The headers of a chunk."""
    fields = {HEADER_OFFSET: str(offset), HEADER_DISPATCH: str(dispatch), HEADER_AT: at.isoformat()}
    fields |= {HEADER_MARK: str(mark)} if mark else {}
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
