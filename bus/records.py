"""Records of session streams: appended with a gapless sequence per stream, by compare-and-set, and read back in order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from nats.js import JetStreamContext

from bus import stored, topology
from bus.stored import Superseded, get_message
from helmr import events, ids, subjects
from helmr.errors import Conflict, TooLarge, Unavailable
from helmr.models import StreamRecord
from helmr.subjects import Scope

#: Bytes of JSON of one record (DESIGN: limits).
MAX_RECORD = 256 * 1024
_RETRY_DELAY = 0.2
#: Seconds a record is retried while the server is away, unless told otherwise.
_PATIENCE = 60.0


class Stored(NamedTuple):
    """A record and the sequence at which the stream SESSIONS holds it."""

    seq: int
    record: StreamRecord


class StreamWriter:
    """Appends to the output streams of one session on behalf of one run; ``patience``: seconds a record is retried.

    ``look_back``: the run may have been executed before, and have stored records without living to say so. ``confirm`` raises
    when the run is not ours any more: another worker may have executed it, and stored its records, before our first one.
    """

    def __init__(
        self,
        js: JetStreamContext,
        scope: Scope,
        session_id: str,
        run_id: str,
        *,
        patience: float = _PATIENCE,
        look_back: bool = False,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._js = js
        self._confirm = confirm
        self._patience = patience
        self._scope = scope
        self._session_id = session_id
        self._run_id = run_id
        self._look_back = look_back
        self._ends: dict[str, tuple[int, int]] = {}
        #: By stream, the message after which somebody else wrote: another worker that executes this run, perhaps.
        self._overtaken: dict[str, int] = {}

    async def append(
        self, stream: str, data: Any, correlation_id: str | None = None, *, number: str | None = None
    ) -> StreamRecord:
        """Append one record after the last one of the stream.

        With ``number`` (it is the run's n-th record of this stream) the record has an id of its own making, and is stored once
        however often the run is executed.

        Raises:
            TooLarge: the record exceeds 256 KiB.
            Unavailable: NATS stays away.
            Exception: what ``confirm`` raises; nothing is stored.
        """
        subject = subjects.io(self._scope, self._session_id, "out", stream)
        record_id = ids.new("rec") if number is None else self._id(stream, number)
        draft = StreamRecord(
            id=record_id,
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

    def _id(self, stream: str, number: str) -> str:
        return ids.derive("rec", *self._scope, self._run_id, stream, number, at_ms=ids.time_ms(self._run_id))

    async def _try(self, subject: str, draft: StreamRecord) -> StreamRecord | None:
        """The record as stored, or None when somebody else was first."""
        since = self._overtaken.get(draft.stream, 0 if self._look_back else None)
        if draft.stream not in self._ends and since is not None:
            found = await self._find(subject, draft.id, since)
            if found is not None:
                return found
        end = self._ends.get(draft.stream) or await self._first_end(subject)
        record = msgspec.structs.replace(draft, sequence=end[1] + 1)
        stored = await publish(self._js, subject, record, end[0])
        if stored is None:
            self._ends.pop(draft.stream, None)
            self._overtaken[draft.stream] = end[0]
            return None
        self._ends[draft.stream] = (stored.seq, stored.record.sequence)
        return stored.record

    async def _first_end(self, subject: str) -> tuple[int, int]:
        """Where the stream ends, before which nothing is of this run: as long as it is ours, nobody else can have written."""
        end = await end_of(self._js, subject)
        if end != (0, 0) and self._confirm is not None:
            await self._confirm()
        return end

    async def _find(self, subject: str, record_id: str, since: int) -> StreamRecord | None:
        async for seq, record in records(self._js, subject, after=since):
            self._ends[record.stream] = (seq, record.sequence)
            if record.id == record_id:
                return record
        return None


async def end_of(js: JetStreamContext, subject: str) -> tuple[int, int]:
    """Where a stream ends: the message sequence and the record sequence of its last record, zeros when it is empty."""
    found = await last(js, subject)
    return (0, 0) if found is None else (found.seq, found.record.sequence)


async def last(js: JetStreamContext, subject: str) -> Stored | None:
    """The last record of a stream, if it has any.

    Raises:
        Unavailable: the server does not answer.
    """
    found = await get_message(js, topology.SESSIONS, subject)
    return None if found is None else Stored(found[0], decode(found[1]))


def decode(body: bytes) -> StreamRecord:
    """The record of a stored message."""
    return msgspec.json.decode(body, type=StreamRecord)


async def records(js: JetStreamContext, subject: str, *, after: int = 0) -> AsyncIterator[Stored]:
    """The records under a subject whose messages come after the sequence ``after``, oldest first.

    Raises:
        Unavailable: the server does not answer.
    """
    while (message := await get_message(js, topology.SESSIONS, subject, after=after)) is not None:
        after = message[0]
        yield Stored(after, decode(message[1]))


async def place(js: JetStreamContext, subject: str, sequence: int) -> int:
    """A message sequence after which the records of one stream are those numbered beyond ``sequence``.

    Numbers rise with message sequences, which others share: a search by halves, some twenty reads however long the stream.

    Raises:
        Unavailable: the server does not answer.
    """
    end = await last(js, subject) if sequence > 0 else None
    if end is None or end.record.sequence <= sequence:
        return 0 if end is None else end.seq
    below, above = 0, end.seq
    while above - below > 1:
        middle = (below + above) // 2
        found = await get_message(js, topology.SESSIONS, subject, after=middle - 1)
        if found is None or decode(found[1]).sequence > sequence:
            above = middle
        else:
            below = found[0]
    return below


async def publish(js: JetStreamContext, subject: str, record: StreamRecord, expected: int) -> Stored | None:
    """Store a record right after the message ``expected``.

    Returns the record as it is stored, which it may have been already, after others; None when somebody else was first.

    Raises:
        TooLarge: it exceeds 256 KiB.
        Unavailable: the server does not acknowledge.
    """
    body = msgspec.json.encode(record)
    if len(body) > MAX_RECORD + 1024:
        raise TooLarge(f"a record of {len(body)} bytes exceeds {MAX_RECORD}")
    seq = await _store(js, subject, body, expected)
    if seq is None:
        # After an unknown outcome, the last record may be the very one we sent.
        found = await last(js, subject)
        return found if found is not None and found.record.id == record.id else None
    return Stored(seq, record)


async def _store(js: JetStreamContext, subject: str, body: bytes, expected: int) -> int | None:
    headers = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
    try:
        return await stored.publish(js, subject, body, headers)
    except Superseded:
        return None


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What an idempotency key stands for: the record it leads to, and a fingerprint of what was asked for."""

    record_id: str
    fingerprint: str


async def send(js: JetStreamContext, scope: Scope, draft: StreamRecord, *, key: str | None = None) -> Stored:
    """Append a record to an input stream; ``draft`` has everything but its sequence.

    With an idempotency ``key``, the same record is stored once, however often it is sent.

    Raises:
        Conflict: the key was used for a record that differs.
        TooLarge: it exceeds 256 KiB.
        Unavailable: the server does not answer; sending again is safe with a key.
    """
    subject = subjects.io(scope, draft.session_id, "in", draft.stream)
    note = None if key is None else await _promise(js, scope, draft, key)
    if note is not None:
        draft = msgspec.structs.replace(draft, id=note[1].record_id)
    while True:
        seq, sequence = await end_of(js, subject)
        # A record can only be there already when its key has been noted; and then after the note.
        if note is not None and seq > note[0]:
            async for stored in records(js, subject, after=note[0]):
                if stored.record.id == draft.id:
                    return stored
                seq, sequence = stored.seq, stored.record.sequence
        record = msgspec.structs.replace(draft, sequence=sequence + 1)
        sent = await publish(js, subject, record, seq)
        if sent is not None:
            return sent


async def _promise(js: JetStreamContext, scope: Scope, draft: StreamRecord, key: str) -> tuple[int, Promise]:
    """The note about a key, written now unless there is one."""
    asked = msgspec.json.encode([draft.stream, draft.correlation_id, draft.data], order="sorted")
    fingerprint = hashlib.sha256(asked).hexdigest()
    digest = hashlib.sha256(f"{draft.stream}\0{key}".encode()).hexdigest()
    subject = subjects.once(scope, draft.session_id, digest)
    fresh = Promise(record_id=draft.id, fingerprint=fingerprint)
    found = await get_message(js, topology.SESSIONS, subject)
    if found is None:
        seq = await _store(js, subject, msgspec.json.encode(fresh), 0)
        if seq is not None:
            return seq, fresh
        found = await get_message(js, topology.SESSIONS, subject)
        if found is None:
            raise Unavailable("the idempotency key could not be noted", hint="try again")
    note = msgspec.json.decode(found[1], type=Promise)
    if note.fingerprint != fingerprint:
        raise Conflict(
            f"the idempotency key {key!r} was used for a different record of the stream {draft.stream!r}",
            hint="use a new key for a new record",
        )
    return found[0], note
