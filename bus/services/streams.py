"""Session streams from outside: sending input, and reading either direction."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal

import jsonschema
import msgspec
from jsonschema.exceptions import best_match

from bus import records
from bus.deployments import Deployments
from bus.log import SESSION, Log
from bus.services.endpoint import Endpoint
from helmr import events, ids, subjects
from helmr.errors import Conflict, NotFound, PayloadInvalid, TooLarge, UsageError
from helmr.events import SessionState
from helmr.models import StreamRecord
from helmr.subjects import Scope

#: Characters of a correlation id and of an idempotency key.
MAX_KEY_LENGTH = 512
#: Bytes of records in one page, and how many: a reply must stay far below max_payload.
_PAGE_BYTES = 512 * 1024
_PAGE = 500

Direction = Literal["in", "out"]


class SendRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One record for an input stream of a session."""

    session: str
    stream: str
    data: Any = None
    correlation_id: str | None = None
    idempotency_key: str | None = None


class ListRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A page of records: those numbered beyond ``after``, with ``correlation_id`` only those that carry it."""

    session: str
    stream: str
    after: int = 0
    limit: int = _PAGE
    correlation_id: str | None = None


class RecordsPage(msgspec.Struct, kw_only=True):
    """Records, oldest first; ``end``: the number of the last record looked at, from which to go on; ``more``: ask again."""

    records: list[StreamRecord]
    end: int
    more: bool


class Streams:
    """The service of input and output streams."""

    def __init__(self, log: Log, deployments: Deployments) -> None:
        self.log = log
        self.deployments = deployments

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("input", "send", SendRequest, self.send),
            Endpoint("input", "list", ListRequest, self.list_input),
            Endpoint("output", "list", ListRequest, self.list_output),
        ]

    async def send(self, scope: Scope, request: SendRequest) -> StreamRecord:
        """Append one record to an input stream.

        Raises:
            NotFound: no such session or stream.
            PayloadInvalid, TooLarge, UsageError: the record cannot be taken.
            Conflict: the session is not open, or the idempotency key stands for another record.
        """
        return await self.store(scope, await self.draft(scope, request), request)

    async def draft(self, scope: Scope, request: SendRequest) -> StreamRecord:
        """The record that a request asks for, checked, and not stored yet.

        Raises:
            NotFound, PayloadInvalid, TooLarge, UsageError, Conflict: it cannot be taken.
        """
        state = (await self.log.present(SESSION, scope, request.session)).state
        declared = await self._declared(scope, state, request.stream, "in")
        _check(request, declared, state.deployment_id)
        if state.status != "open":
            reason = f"session {state.id} is {state.status}: it takes no more input"
            raise Conflict(reason, details={"status": state.status})
        return StreamRecord(
            id=ids.new("rec"),
            session_id=state.id,
            stream=request.stream,
            direction="in",
            sequence=0,
            data=request.data,
            correlation_id=request.correlation_id,
            at=events.now(),
        )

    async def store(self, scope: Scope, draft: StreamRecord, request: SendRequest) -> StreamRecord:
        """Store what :meth:`draft` made of a request; one with an idempotency key once.

        Raises:
            Conflict: the key stands for another record.
        """
        return (await records.send(self.log.js, scope, draft, key=request.idempotency_key)).record

    async def declared(self, scope: Scope, session: str, stream: str, direction: Direction) -> None:
        """Check that a session is there and has such a stream.

        Raises:
            NotFound: it has not, or is not there.
        """
        await self._declared(scope, (await self.log.present(SESSION, scope, session)).state, stream, direction)

    async def list_input(self, scope: Scope, request: ListRequest) -> RecordsPage:
        """A page of an input stream."""
        return await self._page(scope, request, "in")

    async def list_output(self, scope: Scope, request: ListRequest) -> RecordsPage:
        """A page of an output stream."""
        return await self._page(scope, request, "out")

    async def _page(self, scope: Scope, request: ListRequest, direction: Direction) -> RecordsPage:
        state = (await self.log.present(SESSION, scope, request.session)).state
        await self._declared(scope, state, request.stream, direction)
        subject = subjects.io(scope, state.id, direction, request.stream)
        page = RecordsPage(records=[], end=request.after, more=False)
        size = 0
        place = await records.place(self.log.js, subject, request.after)
        async for _, record in records.records(self.log.js, subject, after=place):
            if size > _PAGE_BYTES or len(page.records) >= min(request.limit, _PAGE):
                page.more = True
                break
            page.end = record.sequence
            if request.correlation_id in (None, record.correlation_id):
                page.records.append(record)
                size += len(msgspec.json.encode(record.data)) + 300
        return page

    async def _declared(self, scope: Scope, state: SessionState, name: str, direction: Direction) -> dict[str, Any]:
        deployment = await self.deployments.load(scope, state.deployment_id)
        wanted = "input" if direction == "in" else "output"
        declared = {each["name"]: each for each in deployment.index.get("streams", ()) if each["direction"] == wanted}
        if name in declared:
            found: dict[str, Any] = declared[name]
            return found
        close = get_close_matches(name, declared, n=1)
        hint = f"did you mean {close[0]}?" if close else f"declared: {', '.join(declared) or 'none'}"
        raise NotFound(f"deployment {deployment.version} declares no {wanted} stream {name!r}", hint=hint)


def _check(request: SendRequest, declared: dict[str, Any], deployment_id: str) -> None:
    for what, key in (("correlation id", request.correlation_id), ("idempotency key", request.idempotency_key)):
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise UsageError(f"the {what} must have 1 to {MAX_KEY_LENGTH} characters")
    size = len(msgspec.json.encode(request.data))
    if size > records.MAX_RECORD:
        raise TooLarge(
            f"the record is {size} bytes of JSON; the limit is {records.MAX_RECORD}",
            hint="pass a reference to the data instead",
        )
    schema = declared.get("schema")
    if schema is None:
        return
    error = best_match(_validator(deployment_id, request.stream, msgspec.json.encode(schema)).iter_errors(request.data))
    if error is not None:
        where = error.json_path if error.json_path != "$" else "the record"
        raise PayloadInvalid(
            f"the record does not fit the stream {request.stream!r}: {where}: {error.message[:500]}",
            details={"path": error.json_path},
        )


@lru_cache(maxsize=512)
def _validator(_deployment_id: str, _stream: str, schema: bytes) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(msgspec.json.decode(schema))
