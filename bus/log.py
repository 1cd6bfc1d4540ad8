"""The one log: every change of a run, session, workspace, queue, token, access token or exec is appended here,
with compare-and-set, by this module alone.

All writers of an entity send ``Nats-Expected-Last-Subject-Sequence`` together with the identical filter string of
:func:`helmr.subjects.history`. On a replicated stream the server compares in-flight filters as strings; writers that use
other filters, or none, slip through the check.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext

from bus import topology
from bus.requests import api
from bus.stored import PUBLISH_TIMEOUT, Superseded, get_message, publish, stored_message
from helmr import events, ids, subjects
from helmr.access import AccessEvent, AccessState
from helmr.errors import NotFound, Unavailable
from helmr.events import (
    Draft,
    ExecEvent,
    ExecState,
    QueueEvent,
    QueueState,
    RunEvent,
    RunState,
    SessionEvent,
    SessionState,
    TokenEvent,
    TokenState,
    WorkspaceEvent,
    WorkspaceState,
)
from helmr.reducers import access as access_rules
from helmr.reducers import exec as exec_rules
from helmr.reducers import queue as queue_rules
from helmr.reducers import run_fold
from helmr.reducers import session as session_rules
from helmr.reducers import token as token_rules
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Entity, Scope

log = logging.getLogger(__name__)

_EXPECT_SEQ = "Nats-Expected-Last-Subject-Sequence"
_EXPECT_FILTER = "Nats-Expected-Last-Subject-Sequence-Subject"
#: Where answers go that nobody waits for.
_NOBODY = "_INBOX.nobody"
#: Seconds an append is retried while the server is away, unless told otherwise.
_PATIENCE = 60.0


class _State(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def cursor(self) -> int: ...


class _Event(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def state(self) -> Any: ...


S = TypeVar("S", bound=_State)
E = TypeVar("E", bound=_Event)
T = TypeVar("T")


class Kind(Generic[S, E]):
    """What the log needs to know of one kind of entity: its name, its event type and its reducer."""

    def __init__(self, name: Entity, event_type: type[E], fold: Callable[[S | None, Draft, Any, str], S]) -> None:
        self.name = name
        self.event_type = event_type
        self.fold = fold
        self._decoder = msgspec.json.Decoder(event_type)

    def decode(self, data: bytes) -> E:
        """The event of a stored message."""
        return self._decoder.decode(data)

    def make(self, state: S | None, entity_id: str, draft: Draft) -> E:
        """The event that a draft becomes after ``state``."""
        at = events.now()
        after = self.fold(state, draft, at, entity_id)
        fields: dict[str, Any] = {f"{self.name}_id": entity_id, "cursor": after.cursor, "id": ids.new("evt")}
        if isinstance(after, RunState):
            fields |= {"attempt": after.attempt, "dispatch_attempt": after.dispatch_attempt}
        create: Callable[..., E] = self.event_type
        return create(
            kind=draft.kind,
            at=at,
            source=draft.source,
            message=draft.message,
            data=draft.data,
            state=after,
            **fields,
        )


RUN: Kind[RunState, RunEvent] = Kind(
    "run", RunEvent, lambda state, draft, at, key: run_fold.apply(state, draft.kind, draft.data, at, run_id=key)
)
SESSION: Kind[SessionState, SessionEvent] = Kind(
    "session",
    SessionEvent,
    lambda state, draft, at, key: session_rules.apply(state, draft.kind, draft.data, at, session_id=key),
)
WORKSPACE: Kind[WorkspaceState, WorkspaceEvent] = Kind(
    "workspace",
    WorkspaceEvent,
    lambda state, draft, at, key: workspace_rules.apply(state, draft.kind, draft.data, at, workspace_id=key),
)
QUEUE: Kind[QueueState, QueueEvent] = Kind(
    "queue",
    QueueEvent,
    lambda state, draft, at, key: queue_rules.apply(state, draft.kind, draft.data, at, queue_id=key),
)
TOKEN: Kind[TokenState, TokenEvent] = Kind(
    "token",
    TokenEvent,
    lambda state, draft, at, key: token_rules.apply(state, draft.kind, draft.data, at, token_id=key),
)
ACCESS: Kind[AccessState, AccessEvent] = Kind(
    "access",
    AccessEvent,
    lambda state, draft, at, key: access_rules.apply(state, draft.kind, draft.data, at, access_id=key),
)

EXEC: Kind[ExecState, ExecEvent] = Kind(
    "exec",
    ExecEvent,
    lambda state, draft, at, key: exec_rules.apply(state, draft.kind, draft.data, at, exec_id=key),
)


class Position(msgspec.Struct, Generic[E], frozen=True):
    """The last event of an entity and where it stands in the stream; ``seq`` 0 and no event before the first one."""

    seq: int
    event: E | None

    @property
    def state(self) -> Any:
        """The entity's present state."""
        return self.event.state if self.event else None


class Log:
    """Reads and appends events; ``patience``: seconds an append is retried while the server is away."""

    def __init__(self, nc: Nats, *, patience: float = _PATIENCE) -> None:
        self.nc = nc
        self._patience = patience
        self.js: JetStreamContext = nc.jetstream(timeout=PUBLISH_TIMEOUT)

    async def last(self, kind: Kind[S, E], scope: Scope, entity_id: str) -> Position[E]:
        """The entity's latest event, or an empty position."""
        found = await self._get(subjects.history(scope, kind.name, entity_id))
        return Position(0, None) if found is None else Position(found[0], kind.decode(found[1]))

    async def first(self, kind: Kind[S, E], scope: Scope, entity_id: str) -> E:
        """The entity's first event.

        Raises:
            NotFound: the log has none (any more).
        """
        found = await self._get(subjects.history(scope, kind.name, entity_id), after=0)
        if found is None:
            raise NotFound(f"no {kind.name} {entity_id} in {scope}")
        return kind.decode(found[1])

    async def present(self, kind: Kind[S, E], scope: Scope, entity_id: str) -> E:
        """The entity's latest event.

        Raises:
            NotFound: the log has none (any more).
        """
        position = await self.last(kind, scope, entity_id)
        if position.event is None:
            raise NotFound(f"no {kind.name} {entity_id} in {scope}")
        return position.event

    async def find(self, kind: Kind[S, E], prefix: str, entity_id: str) -> tuple[Scope, E] | None:
        """An entity's latest event by its id alone, whatever its scope; None if there is none, or this is no such id.

        Raises:
            Unavailable: the server does not answer.
        """
        if not ids.is_id(entity_id, prefix):
            return None
        found = await stored_message(self.js, topology.RUNS, subjects.anywhere(kind.name, entity_id))
        if found is None:
            return None
        return subjects.parse_event(found.subject or "").scope, kind.decode(found.data or b"")

    async def events(
        self, kind: Kind[S, E], scope: Scope, entity_id: str, *, after: int = 0, limit: int = 1000
    ) -> list[E]:
        """The entity's events with a cursor beyond ``after``, oldest first."""
        filter_subject = subjects.history(scope, kind.name, entity_id)
        found: list[E] = []
        seq = 0
        while len(found) < limit:
            message = await self._get(filter_subject, after=seq)
            if message is None:
                break
            seq = message[0]
            event = kind.decode(message[1])
            if event.state.cursor > after:
                found.append(event)
        return found

    async def sequences(self, kind: Kind[S, E], scope: Scope, entity_id: str, *, before: int) -> list[int]:
        """Where the entity's events stand in the stream, those before a sequence, oldest first."""
        found: list[int] = []
        while True:
            message = await self._get(subjects.history(scope, kind.name, entity_id), after=found[-1] if found else 0)
            if message is None or message[0] >= before:
                return found
            found.append(message[0])

    async def append(
        self,
        kind: Kind[S, E],
        scope: Scope,
        entity_id: str,
        position: Position[E],
        draft: Draft,
        *,
        headers: dict[str, str] | None = None,
    ) -> Position[E]:
        """Append one event right after ``position``; returns the new position.

        An outcome that stays unknown (the server went away before it answered) is resolved by reading the last event: if
        its id is ours, we succeeded.

        Raises:
            Superseded: another event came first.
            Conflict: the reducer refuses the event.
            Unavailable: the server stayed away.
        """
        event = kind.make(position.state, entity_id, draft)
        lane = draft.data.get("lane", "") if draft.kind == "queued" else ""
        subject = subjects.event(scope, kind.name, entity_id, draft.kind, lane=lane, priority=priority_of(event))
        expected = {
            _EXPECT_SEQ: str(position.seq),
            _EXPECT_FILTER: subjects.history(scope, kind.name, entity_id),
        }
        body = msgspec.json.encode(event)
        try:
            seq = await self._patiently(subject, body, expected | (headers or {}))
        except Superseded:
            # Whether it is ours has to be known, even if the server does not answer that at once, either.
            last = await self._insist(lambda: self.last(kind, scope, entity_id))
            if last.event is not None and last.event.id == event.id:
                return last
            raise
        return Position(seq, event)

    async def store(self, subject: str, body: bytes, headers: dict[str, str]) -> None:
        """Have a message stored, of which a second one does no harm, or is dropped by its ``Nats-Msg-Id``.

        Raises:
            Unavailable: the server stayed away.
        """
        await self._patiently(subject, body, headers)

    async def transact(
        self,
        kind: Kind[S, E],
        scope: Scope,
        entity_id: str,
        decide: Callable[[S], Draft | None],
        *,
        headers: dict[str, str] | None = None,
        known: Position[E] | None = None,
    ) -> Position[E]:
        """Read the entity, let ``decide`` choose an event (or none), append it; again when somebody else was first.

        A ``known`` position spares the first reading.

        Raises:
            NotFound: there is no such entity.
            Conflict: ``decide`` or the reducer refuses.
        """
        while True:
            position = known or await self.last(kind, scope, entity_id)
            known = None
            if position.event is None:
                raise NotFound(f"no {kind.name} {entity_id} in {scope}")
            draft = decide(position.state)
            if draft is None:
                return position
            try:
                return await self.append(kind, scope, entity_id, position, draft, headers=headers)
            except Superseded:
                continue

    async def delete(self, seq: int, *, stream: str = topology.RUNS) -> None:
        """Have the message at ``seq`` deleted, which means nothing any more; that it does not work now does not matter."""
        body = json.dumps({"seq": seq, "no_erase": True}).encode()
        try:
            # An answer is asked for, because the server heeds no request without, and not waited for.
            await self.nc.publish(f"$JS.API.STREAM.MSG.DELETE.{stream}", body, reply=_NOBODY)
        except nats.errors.Error as error:
            log.debug("message #%s of %s stays: %s", seq, stream, error)

    async def _patiently(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        """Publish, again when the server does not answer; what was stored and not acknowledged is stored twice, or refused."""
        return await self._insist(lambda: self._publish(subject, body, headers))

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the server, and again while it does not answer and our patience lasts."""
        deadline = asyncio.get_running_loop().time() + self._patience
        while True:
            try:
                return await ask()
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await self._until_connected(deadline)

    async def _publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        return await publish(self.js, subject, body, headers)

    async def _until_connected(self, deadline: float) -> None:
        """Wait for the server to answer again."""
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        # Not a flush: nats-py's read loop breaks on the answer to one that has timed out.
                        await api(self.nc, "INFO", None, timeout=1.0)
                    except Unavailable:
                        # Not connected: a request can fail at once, so give the reconnect loop room to run.
                        await asyncio.sleep(0.05)
                    else:
                        return
        except TimeoutError:
            return

    async def _get(self, subject: str, *, after: int | None = None) -> tuple[int, bytes] | None:
        """The last message under a filter, or with ``after`` the first one beyond that sequence."""
        return await get_message(self.js, topology.RUNS, subject, after=after)


def priority_of(event: _Event) -> int:
    """The priority token of a dispatch subject."""
    return event.state.priority if isinstance(event.state, RunState) else 0
