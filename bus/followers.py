"""An output stream as server-sent events: what is stored first, then each record as it comes, for as long as that is allowed.

A live message is a hint and no more: what is sent is read from the log. Whoever falls behind is waited for, and what he has not
read is not kept for him; after a break he says which record was the last and loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import datetime, timedelta

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from starlette.responses import StreamingResponse
from starlette.types import Send

from bus import records
from bus.log import ACCESS, Log
from bus.records import Stored
from helmr import events, subjects
from helmr.access import AccessState
from helmr.errors import HelmrError
from helmr.models import StreamRecord
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Seconds between signs of life on a stream that is silent; also how long one may take that nobody reads.
HEARTBEAT = 15.0
_STALLED = 30.0
#: Seconds after which a follower has to come again.
_LONGEST = 3600.0
#: Milliseconds after which a browser does so by itself.
_RETRY = 2000
#: Records between looks at whether following is still allowed.
_STRIDE = 100
#: Those who follow at the same time: in all, and with one access token.
FOLLOWERS, PER_ACCESS = 256, 16


class PublicRecord(msgspec.Struct, kw_only=True):
    """What of a record its reader gets to see."""

    id: str
    sequence: int
    data: object
    correlation_id: str | None
    at: datetime


def public(record: StreamRecord) -> PublicRecord:
    """The public part of a record: it names no run and no session."""
    return PublicRecord(
        id=record.id,
        sequence=record.sequence,
        data=record.data,
        correlation_id=record.correlation_id,
        at=record.at,
    )


class EventStream(StreamingResponse):
    """An answer that goes on; a reader who takes nothing for half a minute is given up."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[bytes]) -> None:
        super().__init__(parts, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._parts = parts

    async def stream_response(self, send: Send) -> None:
        """Send the parts as they come."""

        async def patiently(message: object) -> None:
            async with asyncio.timeout(_STALLED):
                await send(message)  # type: ignore[arg-type]

        async with aclosing(self._parts):
            try:
                await super().stream_response(patiently)
            except TimeoutError:
                log.debug("a follower has stopped reading")


class Followers:
    """Those who follow output streams over HTTP."""

    def __init__(self, log_: Log) -> None:
        self._log = log_
        self._now: Counter[str] = Counter()
        self._heard: set[asyncio.Event] = set()
        self._closed = False

    def full(self, access_id: str) -> bool:
        """Whether there is no room for one more."""
        return self._now.total() >= FOLLOWERS or self._now[access_id] >= PER_ACCESS

    def close(self) -> None:
        """Let all go, at once and in good order; they may come again, to another process or the next."""
        self._closed = True
        for heard in self._heard:
            heard.set()

    async def follow(self, scope: Scope, access: AccessState, after: int) -> AsyncGenerator[bytes]:
        """The events for one who has read the record numbered ``after``, until his time is up."""
        self._now[access.id] += 1
        try:
            async with aclosing(self._events(scope, access, after)) as parts:
                async for part in parts:
                    yield part
        except HelmrError as error:
            log.warning("a follower has to come again: %s", error)
        finally:
            self._now[access.id] -= 1
            self._now += Counter()  # which drops those that are at zero

    async def _events(self, scope: Scope, access: AccessState, after: int) -> AsyncGenerator[bytes]:
        subject = subjects.io(scope, access.session_id or "", "out", access.stream or "")
        ends = min(access.expires_at, events.now() + timedelta(seconds=_LONGEST))
        heard = asyncio.Event()
        yield b"retry: %d\n\n" % _RETRY
        async with (
            _listening(self._log, [subject, subjects.live(scope, "access", access.id)], heard),
            self._told(heard),
        ):
            seq = await records.place(self._log.js, subject, after)
            while await self._allowed(scope, access.id, ends):
                heard.clear()
                async for stored in self._some(subject, seq, heard):
                    seq = stored.seq
                    if access.correlation_id in (None, stored.record.correlation_id):
                        yield _event(stored.record)
                if not await _woken(heard, ends):
                    yield b":\n\n"
        yield b"event: end\ndata:\n\n"

    async def _some(self, subject: str, seq: int, heard: asyncio.Event) -> AsyncIterator[Stored]:
        """The next records, but not all of very many: then there is more to be heard at once."""
        left = _STRIDE
        async for stored in records.records(self._log.js, subject, after=seq):
            yield stored
            left -= 1
            if left == 0:
                heard.set()
                return

    @asynccontextmanager
    async def _told(self, heard: asyncio.Event) -> AsyncIterator[None]:
        """Have ``heard`` set by :meth:`close`, too, while a block runs."""
        self._heard.add(heard)
        try:
            yield
        finally:
            self._heard.discard(heard)

    async def _allowed(self, scope: Scope, access_id: str, ends: datetime) -> bool:
        if self._closed:
            return False
        last = await self._log.last(ACCESS, scope, access_id)
        return events.now() < ends and last.event is not None and last.state.status == "active"


@asynccontextmanager
async def _listening(log_: Log, names: list[str], heard: asyncio.Event) -> AsyncIterator[None]:
    """Set ``heard`` at every live message under these names while a block runs."""

    async def hear(_: Msg) -> None:
        heard.set()

    async with AsyncExitStack() as stack:
        for name in names:
            subscription = await log_.nc.subscribe(name, cb=hear)
            stack.push_async_callback(_unsubscribe, subscription)
        yield


async def _unsubscribe(subscription: Subscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error as error:  # the connection is closed: nothing is left to undo
        log.debug("unsubscribe: %s", error)


async def _woken(heard: asyncio.Event, ends: datetime) -> bool:
    """Wait until something is heard; False when there was nothing for as long as silence may last."""
    left = (ends - events.now()).total_seconds()
    try:
        async with asyncio.timeout(max(min(HEARTBEAT, left), 0)):
            return await heard.wait()
    except TimeoutError:
        return False


def _event(record: StreamRecord) -> bytes:
    return b"id: %d\ndata: %s\n\n" % (record.sequence, msgspec.json.encode(public(record)))
