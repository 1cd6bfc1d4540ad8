"""Sessions: start, get, list, close, cancel."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from helmr import ids, jsonform
from helmr.client.pages import newest
from helmr.client.runs import RunHandle
from helmr.client.streams import OpenSession
from helmr.client.wire import Wire
from helmr.durations import Duration, seconds
from helmr.errors import TimedOut, TooLarge, Unavailable, UsageError
from helmr.events import INLINE_VALUE, MAX_VALUE, MESSAGE_PART
from helmr.models import Session
from helmr.models import Started as StartedRecord

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Tries of one start, with the same request id: completing it twice is the server's business to prevent.
_TRIES = 3


class _Part(msgspec.Struct):
    digest: str


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A started (or found) session, and a handle for its run."""

    session: Session
    run: RunHandle
    reused: bool


class Sessions:
    """``client.sessions``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def _wire(self) -> Wire:
        return self._client.wire

    async def start(
        self,
        task: Any,
        payload: Any = None,
        *,
        external_id: str | None = None,
        workspace: str | None = None,
        queue: str | None = None,
        concurrency_key: str | None = None,
        priority: int = 0,
        ttl: Duration | None = None,
        expires_in: Duration | None = None,
        max_duration: Duration | None = None,
        metadata: dict[str, Any] | None = None,
        tags: tuple[str, ...] | list[str] = (),
    ) -> Started:
        """Start a session of ``task`` (a task object or its id) with its first run.

        With an ``external_id`` that was used before, the same start gives the same session and run (``reused``).

        Raises:
            NotFound: nothing is deployed, or no such task.
            TooLarge: the payload exceeds 16 MiB of JSON.
            PayloadInvalid: the payload does not fit the task's schema; no run was created.
            Conflict: the external id belongs to a different start.
        """
        body = {
            "task": task if isinstance(task, str) else task.id,
            "request_id": ids.new("req"),
            **await self._payload(_builtins(payload)),
            "external_id": external_id,
            "workspace": None if workspace is None else await self._client.resolve("workspace", workspace),
            "queue": queue,
            "concurrency_key": concurrency_key,
            "priority": priority,
            "ttl": None if ttl is None else seconds(ttl, what="ttl"),
            "expires_in": None if expires_in is None else seconds(expires_in, what="expires_in"),
            "max_duration": None if max_duration is None else seconds(max_duration, what="max duration"),
            "metadata": metadata or {},
            "tags": list(tags),
        }
        record = await self._start(body)
        run = self._client.runs.handle(record.run)
        return Started(session=record.session, run=run, reused=record.reused)

    async def _payload(self, payload: Any) -> dict[str, Any]:
        """How the request says what the payload is: itself, or the parts that were sent before."""
        body = msgspec.json.encode(payload)
        if len(body) <= INLINE_VALUE:
            return {"payload": payload}
        if len(body) > MAX_VALUE:
            raise TooLarge(
                f"the payload is {len(body)} bytes of JSON; the limit is {MAX_VALUE}",
                hint="pass a reference to the data instead",
            )
        parts = [body[at : at + MESSAGE_PART] for at in range(0, len(body), MESSAGE_PART)]
        sent = [await self._wire.call("session", "part", {"data": part}, _Part, timeout=60) for part in parts]
        return {"payload_parts": [each.digest for each in sent]}

    async def _start(self, body: dict[str, Any]) -> StartedRecord:
        for left in reversed(range(_TRIES)):
            try:
                return await self._wire.call("session", "start", body, StartedRecord)
            except (TimedOut, Unavailable):
                if left == 0:
                    raise
                await asyncio.sleep(0.2)  # whoever restarts needs a moment
        raise AssertionError("unreachable")

    async def get(self, session: str | Session) -> Session:
        """One session, by id, unique prefix or ``@last``."""
        session_id = await self._client.resolve("session", _id(session))
        return await self._wire.call("session", "get", {"id": session_id}, Session)

    def open(self, session: str | Session) -> OpenSession:
        """The streams of a session: ``open(session).input("approval").send(…)``."""
        return OpenSession(self._client, _id(session))

    async def list(self, *, status: str | None = None, task: str | None = None, limit: int = 50) -> list[Session]:
        """Sessions, newest first."""
        return await newest(self._wire, "sessions", {"status": status, "task": task}, Session, limit)

    async def close(self, session: str | Session) -> Session:
        """Take no more input; refused while a run is active."""
        session_id = await self._client.resolve("session", _id(session))
        return await self._wire.call("session", "close", {"id": session_id}, Session)

    async def cancel(self, session: str | Session, *, reason: str | None = None) -> Session:
        """Cancel the session and its current run."""
        session_id = await self._client.resolve("session", _id(session))
        return await self._wire.call("session", "cancel", {"id": session_id, "reason": reason}, Session)


def _id(session: str | Session) -> str:
    return session if isinstance(session, str) else session.id


def _builtins(payload: Any) -> Any:
    """The payload as JSON values; dataclasses, Structs, TypedDicts and pydantic models are taken as they are."""
    try:
        return jsonform.to_builtins(payload)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the payload cannot be written as JSON: {error}") from error
