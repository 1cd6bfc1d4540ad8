"""Reads back what execs wrote, as far as it is kept."""

from __future__ import annotations

from nats.js import JetStreamContext

from bus import topology
from bus.chunks import next_message
from helmr import subjects
from helmr.exec_frames import OFFSET
from helmr.models import ExecChunk
from helmr.subjects import Scope

#: What a chunk counts for beside its bytes.
_OVERHEAD = 200


async def read_output(
    js: JetStreamContext, scope: Scope, exec_id: str, *, stream: str | None, after: int, limit: int
) -> tuple[list[ExecChunk], bool]:
    """Chunks stored beyond sequence ``after``, some ``limit`` bytes of them, and whether there may be more.

    Raises:
        Unavailable: NATS does not answer.
    """
    wanted = subjects.exec_output(scope, exec_id, stream or "*")
    found: list[ExecChunk] = []
    size = 0
    while size < limit:
        message = await next_message(js, topology.EXECS, wanted, after)
        if message is None:
            return found, False
        after = message.seq or 0
        chunk = parse(message.subject or "", message.data or b"", after)
        found.append(chunk)
        size += len(chunk.data) + _OVERHEAD
    return found, True


def parse(subject: str, data: bytes, seq: int) -> ExecChunk:
    """The chunk of a stored message."""
    (offset,) = OFFSET.unpack_from(data)
    return ExecChunk(seq=seq, stream=subject.rpartition(".")[2], offset=offset, data=data[OFFSET.size :])
