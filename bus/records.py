"""Records of session streams: appended with a gapless sequence per stream, by compare-and-set."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.js import JetStreamContext

from bus import topology
from bus.log import get_message
from helmr import events, ids, subjects
from helmr.errors import HelmrError, TooLarge, Unavailable
from helmr.models import StreamRecord
from helmr.subjects import Scope

#: Bytes of JSON of one record (DESIGN: limits).
MAX_RECORD = 256 * 1024
_WRONG_SEQUENCE = 10071
_TIMEOUT = 5.0
_RETRY_DELAY = 0.2
#: Seconds a record is retried while the server is away, unless told otherwise.
_PATIENCE = 60.0


class StreamWriter:
    """Appends to the output streams of one session on behalf of one run; ``patience``: seconds a record is retried."""

    def __init__(
        self, js: JetStreamContext, scope: Scope, session_id: str, run_id: str, *, patience: float = _PATIENCE
    ) -> None:
        self._js = js
        self._patience = patience
        self._scope = scope
        self._session_id = session_id
        self._run_id = run_id
        self._ends: dict[str, tuple[int, int]] = {}

    async def append(self, stream: str, data: Any, correlation_id: str | None = None) -> StreamRecord:
        """Append one record after the last one of the stream.

        Raises:
            TooLarge: the record exceeds 256 KiB.
            Unavailable: NATS stays away.
        """
        subject = subjects.io(self._scope, self._session_id, "out", stream)
        draft = StreamRecord(
            id=ids.new("rec"),
            session_id=self._session_id,
            stream=stream,
            direction="out",
            sequence=0,
            data=data,
            correlation_id=correlation_id,
            run_id=self._run_id,
            at=events.now(),
        )
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            try:
                record = await self._try(subject, draft)
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_RETRY_DELAY)  # the server is away; a repeat is told from the original by its id
            else:
                if record is not None:
                    return record

    async def _try(self, subject: str, draft: StreamRecord) -> StreamRecord | None:
        """The record as stored, or None when somebody else was first."""
        seq, sequence = self._ends.get(draft.stream) or await self._end(subject)
        record = msgspec.structs.replace(draft, sequence=sequence + 1)
        stored = await self._publish(subject, record, seq)
        if stored is None:
            del self._ends[draft.stream]
            return None
        self._ends[draft.stream] = (stored, record.sequence)
        return record

    async def _end(self, subject: str) -> tuple[int, int]:
        found = await get_message(self._js, topology.SESSIONS, subject)
        stream = subject.rpartition(".")[2]
        end = (0, 0) if found is None else (found[0], msgspec.json.decode(found[1], type=StreamRecord).sequence)
        self._ends[stream] = end
        return end

    async def _publish(self, subject: str, record: StreamRecord, expected: int) -> int | None:
        """The sequence it was stored at, or None when somebody else was first (or it is stored already)."""
        body = msgspec.json.encode(record)
        if len(body) > MAX_RECORD + 1024:
            raise TooLarge(f"a record of {len(body)} bytes exceeds {MAX_RECORD}")
        headers = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        try:
            ack = await self._js.publish(subject, body, timeout=_TIMEOUT, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code == _WRONG_SEQUENCE:
                return await self._ours(subject, record)
            if error.code == 503:
                raise Unavailable(f"JetStream is not ready: {error.description}") from error
            raise HelmrError(f"the record is refused: {error.description}") from error
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise Unavailable(f"NATS does not acknowledge: {error}") from error
        return ack.seq

    async def _ours(self, subject: str, record: StreamRecord) -> int | None:
        """After an unknown outcome, the last record may be the very one we sent."""
        found = await get_message(self._js, topology.SESSIONS, subject)
        if found is not None and msgspec.json.decode(found[1], type=StreamRecord).id == record.id:
            return found[0]
        return None
