"""Asking about runs, and cancelling them: answered from the log itself, without the projector."""

from __future__ import annotations

from typing import Any

import msgspec

from bus.chunks import read_chunks
from bus.explainer import Explainer
from bus.leases import bury, spec_of
from bus.log import RUN, Log
from bus.presence import Presence
from bus.services.endpoint import Endpoint
from bus.timers import cancel_header
from bus.values import Page, Values
from helmr.chunks import LogChunk
from helmr.errors import Conflict, NotFound
from helmr.events import ArtifactRef, Draft, RunEvent, RunState
from helmr.explanation import Explanation
from helmr.models import Event, Run, event_record, run_record
from helmr.reducers import run as rules
from helmr.subjects import Scope

#: Bytes of log chunks in one page: base64 makes them a third larger, and a reply must stay far below max_payload.
_LOG_PAGE_BYTES = 512 * 1024


class RunRef(msgspec.Struct, kw_only=True):
    """A request that names a run."""

    id: str


class EventsRequest(msgspec.Struct, kw_only=True):
    """A page of a run's events, those with a cursor beyond ``after``."""

    id: str
    after: int = 0
    limit: int = 500


class EventsPage(msgspec.Struct, kw_only=True):
    """Events, oldest first; ``terminal``: nothing follows the last of them."""

    events: list[Event]
    terminal: bool


class LogsRequest(msgspec.Struct, kw_only=True):
    """A page of a run's log chunks, those stored after ``after``."""

    id: str
    after: int = 0
    attempt: int | None = None
    stream: str | None = None


class LogsPage(msgspec.Struct, kw_only=True):
    """Log chunks in the order they were stored; ``more``: ask again after the last ``seq``."""

    chunks: list[LogChunk]
    more: bool


class ValueRequest(msgspec.Struct, kw_only=True):
    """A page of a large payload or output, from ``offset`` on."""

    id: str
    offset: int = 0


class CancelRequest(msgspec.Struct, kw_only=True):
    """End a run."""

    id: str
    reason: str | None = None
    force: bool = False


class Runs:
    """The run service."""

    def __init__(self, log: Log, presence: Presence, explainer: Explainer, values: Values) -> None:
        self.log = log
        self.values = values
        self.presence = presence
        self.explainer = explainer

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("run", "get", RunRef, self.get),
            Endpoint("run", "output", ValueRequest, self.output),
            Endpoint("run", "payload", ValueRequest, self.payload),
            Endpoint("run", "events", EventsRequest, self.events),
            Endpoint("run", "logs", LogsRequest, self.logs),
            Endpoint("run", "explain", RunRef, self.explain),
            Endpoint("run", "cancel", CancelRequest, self.cancel),
        ]

    async def get(self, scope: Scope, request: RunRef) -> Run:
        """One run, as its first and last event tell."""
        last = await self.log.present(RUN, scope, request.id)
        return run_record(*scope, spec_of(await self._first(scope, last)), last)

    async def output(self, scope: Scope, request: ValueRequest) -> Page:
        """A page of the JSON of a large output."""
        run = await self.get(scope, RunRef(id=request.id))
        return await self._page(run.output_artifact, request)

    async def payload(self, scope: Scope, request: ValueRequest) -> Page:
        """A page of the JSON of a large payload."""
        spec = spec_of(await self.log.first(RUN, scope, request.id))
        return await self._page(spec.payload_artifact, request)

    async def _page(self, reference: ArtifactRef | None, request: ValueRequest) -> Page:
        if reference is None:
            raise NotFound(f"run {request.id} has none that is stored apart")
        return await self.values.page(reference, max(request.offset, 0))

    async def explain(self, scope: Scope, request: RunRef) -> Explanation:
        """What a run is doing or why it is not, since when, and what would change that."""
        return await self.explainer.explain(scope, request.id)

    async def _first(self, scope: Scope, last: RunEvent) -> RunEvent:
        return last if last.cursor == 1 else await self.log.first(RUN, scope, last.run_id)

    async def events(self, scope: Scope, request: EventsRequest) -> EventsPage:
        """A page of events."""
        found = await self.log.events(RUN, scope, request.id, after=request.after, limit=min(request.limit, 1000))
        if not found:
            last = await self.log.present(RUN, scope, request.id)
            return EventsPage(events=[], terminal=last.state.terminal)
        return EventsPage(events=[event_record(e) for e in found], terminal=found[-1].state.terminal)

    async def logs(self, scope: Scope, request: LogsRequest) -> LogsPage:
        """A page of log chunks."""
        chunks, more = await read_chunks(
            self.log.js,
            scope,
            request.id,
            attempt=request.attempt,
            stream=request.stream,
            after=request.after,
            limit=_LOG_PAGE_BYTES,
        )
        if not chunks and request.after == 0:
            await self.log.present(RUN, scope, request.id)
        return LogsPage(chunks=chunks, more=more)

    async def cancel(self, scope: Scope, request: CancelRequest) -> Run:
        """Cancel: at once when nothing executes the run, else by asking its worker. Asking twice is fine."""
        held: RunState | None = None

        def decide(state: RunState) -> Draft | None:
            nonlocal held
            held = state if state.lease is not None else None
            alive = state.lease is not None and self.presence.is_alive(state.lease.worker)
            return rules.cancel(state, reason=request.reason, force=request.force, holder_alive=alive)

        after = await self.log.transact(RUN, scope, request.id, decide, headers=cancel_header(scope, request.id, "ttl"))
        if held is not None and after.state.status == "cancelled":  # its worker, which is gone, cannot say so
            await bury(self.log, scope, held)
        return await self.get(scope, RunRef(id=request.id))

    async def cancel_quietly(self, scope: Scope, run_id: str, reason: str) -> Any:
        """Cancel a run as part of something larger; that it has just ended is no error."""
        try:
            return await self.cancel(scope, CancelRequest(id=run_id, reason=reason))
        except Conflict:
            return await self.get(scope, RunRef(id=run_id))
