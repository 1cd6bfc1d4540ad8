"""Reads back what execs wrote, as far as it is kept."""

from __future__ import annotations

from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from bus import topology
from bus.chunks import read_page
from helmr import exec_frames, subjects
from helmr.models import ExecChunk
from helmr.subjects import Scope


async def read_output(
    js: JetStreamContext, scope: Scope, exec_id: str, *, stream: str | None, after: int, limit: int
) -> tuple[list[ExecChunk], bool]:
    """Chunks stored beyond sequence ``after``, some ``limit`` bytes of them, and whether there may be more.

    Raises:
        Unavailable: NATS does not answer.
    """
    wanted = subjects.exec_output(scope, exec_id, stream or "*")
    return await read_page(js, topology.EXECS, wanted, _parse, after=after, limit=limit)


def _parse(message: RawStreamMsg) -> ExecChunk:
    return exec_frames.parse_output(message.subject or "", message.data or b"", seq=message.seq or 0)
