"""The streams of a session: sending input, listing records, following them live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from helmr import jsonform, subjects
from helmr.client.wire import PATIENCE, Wire
from helmr.errors import UsageError
from helmr.jsonform import ConversionError
from helmr.models import StreamRecord

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds without a live message after which a follower asks, in case one was lost with a connection.
_LOOK_AGAIN = 5.0


class _Page(msgspec.Struct):
    records: list[StreamRecord]
    end: int
    more: bool


class OpenSession:
    """The streams of one session, by name; made by ``client.sessions.open(session)``."""

    def __init__(self, client: AsyncClient, session: str) -> None:
        self._client = client
        self._session = session

    def input(self, stream: str) -> Input:
        """An input stream."""
        return Input(self._client, self._session, stream)

    def output(self, stream: str) -> Output:
        """An output stream."""
        return Output(self._client, self._session, stream)


class _Stream:
    noun: Literal["input", "output"]

    def __init__(self, client: AsyncClient, session: str, stream: str) -> None:
        self._client = client
        self._session = session
        self.name = stream

    @property
    def _wire(self) -> Wire:
        return self._client.wire

    async def _id(self) -> str:
        return await self._client.resolve("session", self._session)

    async def list(self, *, after: int = 0, limit: int = 500, correlation_id: str | None = None) -> list[StreamRecord]:
        """Records numbered beyond ``after``, oldest first.

        Raises:
            NotFound: no such session, or it declares no such stream.
        """
        session, found = await self._id(), list[StreamRecord]()
        async for record in self._stored(session, after, correlation_id):
            if len(found) == limit:
                break
            found.append(record)
        return found

    async def follow(self, *, after: int = 0, correlation_id: str | None = None) -> AsyncIterator[StreamRecord]:
        """Records numbered beyond ``after``, stored ones first and then as they come, for ever."""
        session = await self._id()
        arrived = asyncio.Event()
        direction: Literal["in", "out"] = "in" if self.noun == "input" else "out"
        subject = subjects.io(self._wire.scope, session, direction, self.name)
        # A live message is a hint and no more: the log may yet refuse the record it carries.
        async with self._wire.subscribe(subject, lambda _: arrived.set()):
            while True:
                arrived.clear()
                async for record in self._stored(session, after, None, patience=PATIENCE):
                    after = record.sequence
                    if correlation_id in (None, record.correlation_id):
                        yield record
                try:
                    async with asyncio.timeout(_LOOK_AGAIN):
                        await arrived.wait()
                except TimeoutError:
                    continue

    async def _stored(
        self, session: str, after: int, correlation_id: str | None, *, patience: float = 0.0
    ) -> AsyncIterator[StreamRecord]:
        body: dict[str, Any] = {"session": session, "stream": self.name, "correlation_id": correlation_id}
        more = True
        while more:
            page = await self._wire.call(self.noun, "list", body | {"after": after}, _Page, patience=patience)
            for record in page.records:
                yield record
            after, more = page.end, page.more


class Output(_Stream):
    """What a session's runs append for whoever reads it."""

    noun = "output"


class Input(_Stream):
    """What others send to a session's runs."""

    noun = "input"

    async def send(
        self, data: Any, *, correlation_id: str | None = None, idempotency_key: str | None = None
    ) -> StreamRecord:
        """Append one record; a run that waits for it goes on.

        Args:
            correlation_id: a wait that names one takes only records that carry it.
            idempotency_key: sending the same record again with the same key stores it once.

        Raises:
            NotFound: no such session, or it declares no such stream.
            PayloadInvalid: the record does not fit the stream's schema.
            Conflict: the session takes no more input, or the key stands for another record.
        """
        try:
            record = jsonform.to_builtins(data)
        except ConversionError as error:
            raise UsageError(f"the record cannot be written as JSON: {error}") from error
        body = {
            "session": await self._id(),
            "stream": self.name,
            "data": record,
            "correlation_id": correlation_id,
            "idempotency_key": idempotency_key,
        }
        return await self._wire.call("input", "send", body, StreamRecord)
