"""Starting sessions, and asking about them.

A start touches up to three entities: session opened, workspace created, run queued. Their ids are derived from the request, so
that a client's retry completes the same start and never makes a second one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import msgspec

from bus import timers
from bus.leases import spec_of
from bus.log import RUN, SESSION, WORKSPACE, E, Kind, Log, Position, S
from bus.services.endpoint import Endpoint
from bus.starts import Plan, Planner, StartRequest
from bus.stored import Superseded
from helmr import events
from helmr.errors import Conflict, HelmrError
from helmr.events import Draft, RunEvent, SessionEvent, SessionState, Status
from helmr.models import Session, Started, run_record, session_record
from helmr.reducers import session as rules
from helmr.subjects import Scope

#: The timer of a session, armed if it is to expire.
EXPIRY = "session"


class Ref(msgspec.Struct, kw_only=True):
    """A request that only names an entity."""

    id: str
    reason: str | None = None


class PartRequest(msgspec.Struct, kw_only=True):
    """Part of the JSON of a payload that is too large for one request."""

    data: bytes


class Part(msgspec.Struct, kw_only=True):
    """What to call a part in the start request."""

    digest: str


class Sessions:
    """The session service."""

    def __init__(
        self,
        log: Log,
        planner: Planner,
        cancel_run: Any,
        withdraw: Callable[[str], None],
        go_on: Callable[[Scope, str], Awaitable[None]],
    ) -> None:
        self.log = log
        self.planner = planner
        self._cancel_run = cancel_run
        #: Told of a run that was let into a lane and is not queued after all: it has been, by an earlier start.
        self._withdraw = withdraw
        #: Makes the run of a session's turn, unless it is there.
        self._go_on = go_on

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("session", "start", StartRequest, self.start),
            Endpoint("session", "part", PartRequest, self.part),
            Endpoint("session", "get", Ref, self.get),
            Endpoint("session", "close", Ref, self.close),
            Endpoint("session", "cancel", Ref, self.cancel),
        ]

    async def start(self, scope: Scope, request: StartRequest) -> Started:
        """Open a session with its first run, or find the one this start made before."""
        plan = await self.planner.plan(scope, request)
        if request.external_id is None:
            await self._arm_expiry(scope, plan.session_id, plan.opened)
            return await self._append_all(scope, plan)
        try:
            opened = await self.log.append(SESSION, scope, plan.session_id, Position(0, None), plan.session)
        except Superseded:
            self._withdraw(plan.run_id)
            return await self._reuse(scope, plan)
        # Not before: the session, and its timer, may be an earlier start's. Whoever finishes a half-done start arms it, too.
        await self._arm_expiry(scope, plan.session_id, plan.opened)
        return await self._append_rest(scope, plan, opened.event)

    async def part(self, _scope: Scope, request: PartRequest) -> Part:
        """Keep part of a large payload until the start that names it, wherever that is answered."""
        return Part(digest=(await self.planner.values.put(request.data)).digest)

    async def _arm_expiry(self, scope: Scope, session_id: str, state: SessionState) -> None:
        if state.expires_at is not None:
            await timers.arm(self.log, scope, session_id, EXPIRY, state.expires_at)

    async def _arm_ttl(self, scope: Scope, plan: Plan, ttl: float) -> None:
        """Arm the timer before the run is there; but not for a start that is repeated: it runs already, or has been leased."""
        if (await self.log.last(RUN, scope, plan.run_id)).event is None:
            await timers.arm(self.log, scope, plan.run_id, "ttl", events.now() + timedelta(seconds=ttl))

    async def _append_all(self, scope: Scope, plan: Plan) -> Started:
        """All at once: publishes of one connection are stored in their order."""
        opened, started = await asyncio.gather(
            self._append_or_read(SESSION, scope, plan.session_id, plan.session),
            self._append_rest(scope, plan, None),
        )
        session = session_record(*scope, opened.state, started.run.status)
        return msgspec.structs.replace(started, session=session)

    async def _append_rest(self, scope: Scope, plan: Plan, opened: SessionEvent | None) -> Started:
        if plan.ttl is not None:
            await self._arm_ttl(scope, plan, plan.ttl)
        writes: list[Any] = []
        if plan.workspace is not None:
            writes.append(self._append_or_read(WORKSPACE, scope, plan.workspace_id, plan.workspace))
        writes.append(self._append_or_read(RUN, scope, plan.run_id, plan.run))
        queued: RunEvent = (await asyncio.gather(*writes))[-1]
        run = run_record(*scope, plan.spec, queued)
        if opened is None:
            return Started(session=plan.session_preview(scope), run=run)
        return Started(session=session_record(*scope, opened.state, run.status), run=run)

    async def _append_or_read(self, kind: Kind[S, E], scope: Scope, entity_id: str, draft: Draft) -> E:
        """Append an entity's first event; a retry finds that it stands already."""
        try:
            position = await self.log.append(kind, scope, entity_id, Position(0, None), draft)
        except Superseded:
            self._withdraw(entity_id)
            return await self.log.present(kind, scope, entity_id)
        if position.event is None:
            raise HelmrError(f"{kind.name} {entity_id} was not stored")
        return position.event

    async def _reuse(self, scope: Scope, plan: Plan) -> Started:
        existing = await self.log.present(SESSION, scope, plan.session_id)
        state = existing.state
        if state.fingerprint != plan.fingerprint:
            hint = "use another --external-id, or start with the same task, payload and options"
            raise Conflict(
                f"external id {state.external_id!r} belongs to session {state.id}, started differently", hint=hint
            )
        run = await self.log.last(RUN, scope, state.run_id)
        if run.event is None and existing.kind == "turn":
            # Whoever appended the turn is about to make its run, or has died before that.
            await self._go_on(scope, state.id)
        if run.event is not None or existing.kind != "opened":
            return Started(
                session=await self.get(scope, Ref(id=state.id)), run=await self._run(scope, state.run_id), reused=True
            )
        return msgspec.structs.replace(await self.complete(scope, existing), reused=True)

    async def complete(self, scope: Scope, opened: SessionEvent) -> Started:
        """Make what an opened session lacks: a start may have been interrupted after its first event. Repeating it is fine."""
        await self._arm_expiry(scope, opened.session_id, opened.state)
        return await self._append_rest(scope, await self.planner.again(scope, opened), opened)

    async def _run(self, scope: Scope, run_id: str) -> Any:
        first, last = await asyncio.gather(self.log.first(RUN, scope, run_id), self.log.present(RUN, scope, run_id))
        return run_record(*scope, spec_of(first), last)

    async def get(self, scope: Scope, request: Ref) -> Session:
        """One session."""
        event = await self.log.present(SESSION, scope, request.id)
        run = await self.log.last(RUN, scope, event.state.run_id)
        return session_record(*scope, event.state, run.state.status if run.event else None)

    async def close(self, scope: Scope, request: Ref) -> Session:
        """Take no more input; refused while a run is active."""
        session = await self.get(scope, request)
        run = await self.log.last(RUN, scope, session.run_id)
        # A turn without a run is about to get one.
        status: Status | None = run.state.status if run.event else "queued" if session.turn else None
        position = await self.log.transact(
            SESSION,
            scope,
            request.id,
            lambda s: rules.close(s, run_status=status),
            headers=timers.cancel_header(scope, request.id, EXPIRY),
        )
        return session_record(*scope, position.state, status)

    async def cancel(self, scope: Scope, request: Ref) -> Session:
        """Cancel the session and its current run."""
        headers = timers.cancel_header(scope, request.id, EXPIRY)
        position = await self.log.transact(
            SESSION, scope, request.id, lambda s: rules.cancel(s, reason=request.reason), headers=headers
        )
        await self._end_run(scope, position.state, request.reason or "session cancelled")
        return await self.get(scope, request)

    async def expire(self, scope: Scope, session_id: str) -> None:
        """The timer of a session has fired: end it, and cancel its current run. Doing it twice is fine."""
        position = await self.log.transact(SESSION, scope, session_id, lambda s: rules.expire(s, now=events.now()))
        await self._end_run(scope, position.state, rules.EXPIRED)

    async def _end_run(self, scope: Scope, state: SessionState, reason: str) -> None:
        run = await self.log.last(RUN, scope, state.run_id)
        if run.event is not None and not run.event.state.terminal:
            await self._cancel_run(scope, state.run_id, reason)
