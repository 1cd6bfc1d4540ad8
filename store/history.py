"""Answers the canned questions about the past over request/reply, from within the projector's process.

What a question needs of the database is the store's business (:class:`store.history_store.Reads`). Free SQL is for
:mod:`store.queries`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from bus.services.endpoint import Endpoint
from helmr.chunks import LogChunk
from helmr.errors import UsageError
from helmr.models import Event, LogMatch
from helmr.subjects import Scope
from helmr.version import __version__
from store.history_store import Entity, Found
from store.projector import FRESHNESS_DEADLINE, Projector
from store.reads import point_in_time
from store.search import Wanted


class Request(msgspec.Struct, kw_only=True):
    """``fresh``: answer only once everything stored before the request has been applied."""

    fresh: bool = False


class Ref(Request, kw_only=True):
    """A request that names one record by its complete id."""

    id: str


class RunsRequest(Request, kw_only=True):
    """Runs, newest first; ``before`` is the last page's ``next``, ``since`` a time or a duration."""

    status: str | list[str] | None = None
    task: str | None = None
    session: str | None = None
    workspace: str | None = None
    since: str | float | None = None
    limit: int = 50
    before: str | None = None


class SessionsRequest(Request, kw_only=True):
    """Sessions, newest first."""

    status: str | list[str] | None = None
    task: str | None = None
    workspace: str | None = None
    external_id: str | None = None
    since: str | float | None = None
    limit: int = 50
    before: str | None = None


class WorkspacesRequest(Request, kw_only=True):
    """Workspaces, newest first; ``state``: live, stopped or deleted."""

    state: str | list[str] | None = None
    tag: str | list[str] | None = None
    since: str | float | None = None
    limit: int = 50
    before: str | None = None


class TokensRequest(Request, kw_only=True):
    """Tokens, newest first, without the data they were completed with."""

    status: str | list[str] | None = None
    tag: str | list[str] | None = None
    run: str | None = None
    session: str | None = None
    since: str | float | None = None
    limit: int = 50
    before: str | None = None


class AccessRequest(Request, kw_only=True):
    """Access tokens, newest first."""

    status: str | list[str] | None = None
    session: str | None = None
    since: str | float | None = None
    limit: int = 50
    before: str | None = None


class DeploymentsRequest(Request, kw_only=True):
    """Deployments, newest first."""

    limit: int = 50
    before: str | None = None


class RunsPage(msgspec.Struct, kw_only=True):
    """Run records; ``next`` is ``before`` for the next page, None at the end."""

    runs: list[msgspec.Raw]
    next: str | None


class SessionsPage(msgspec.Struct, kw_only=True):
    """Session records."""

    sessions: list[msgspec.Raw]
    next: str | None


class WorkspacesPage(msgspec.Struct, kw_only=True):
    """Workspace records."""

    workspaces: list[msgspec.Raw]
    next: str | None


class TokensPage(msgspec.Struct, kw_only=True):
    """Token records."""

    tokens: list[msgspec.Raw]
    next: str | None


class AccessPage(msgspec.Struct, kw_only=True):
    """Records of access tokens."""

    access: list[msgspec.Raw]
    next: str | None


class DeploymentsPage(msgspec.Struct, kw_only=True):
    """Deployment records."""

    deployments: list[msgspec.Raw]
    next: str | None


class EventsRequest(Request, kw_only=True):
    """A page of a run's events, those with a cursor beyond ``after``."""

    run_id: str
    after: int = 0
    limit: int = 500


class EventsPage(msgspec.Struct, kw_only=True):
    """Events, oldest first; ``terminal``: nothing follows the last of them."""

    events: list[Event]
    terminal: bool


class LogsRequest(Request, kw_only=True):
    """A page of a run's log chunks, those with a sequence beyond ``after_seq``."""

    run_id: str
    attempt: int | None = None
    stream: str | None = None
    after_seq: int = 0
    limit: int = 1000


class LogsPage(msgspec.Struct, kw_only=True):
    """Log chunks in the order they were stored; ``more``: ask again after the last ``seq``."""

    chunks: list[LogChunk]
    more: bool


class SearchRequest(Request, kw_only=True):
    """Lines of logs; ``after`` is the last reply's ``next``, ``since`` a time or a duration, ``context`` lines around each."""

    pattern: str
    regex: bool = False
    ignore_case: bool = False
    since: str | float = "24h"
    task: str | None = None
    run_id: str | None = None
    stream: str | None = None
    context: int = 0
    after: str | None = None


class SearchPage(msgspec.Struct, kw_only=True):
    """Matches in the order the log stored them, maybe none; ``next``: go on from there; None: that was all."""

    matches: list[LogMatch]
    next: str | None


class ResolveRequest(Request, kw_only=True):
    """Ids by prefix, or the last one."""

    entity: Entity
    prefix: str | None = None
    last: bool = False


class Resolved(msgspec.Struct, kw_only=True):
    """At most ten ids, newest first."""

    ids: list[str]


class StreamStatus(msgspec.Struct, kw_only=True):
    """How far a stream has been applied; ``lag_seconds``: how long the first message that has not been is stored, else 0."""

    applied: int
    last: int
    lag_seconds: float


class HistoryStatus(msgspec.Struct, kw_only=True):
    """Whether the projection keeps up."""

    streams: dict[str, StreamStatus]
    version: str


class History:
    """The history service over a running projector."""

    def __init__(self, projector: Projector) -> None:
        self.projector = projector
        self.reads = projector.store.answers()

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        verbs: dict[str, tuple[type[Any], Any]] = {
            "runs": (RunsRequest, self.runs),
            "run": (Ref, self._one("run")),
            "sessions": (SessionsRequest, self.sessions),
            "session": (Ref, self._one("session")),
            "workspaces": (WorkspacesRequest, self.workspaces),
            "workspace": (Ref, self._one("workspace")),
            "tokens": (TokensRequest, self.tokens),
            "token": (Ref, self._one("token")),
            "access": (AccessRequest, self.access),
            "deployments": (DeploymentsRequest, self.deployments),
            "events": (EventsRequest, self.events),
            "logs": (LogsRequest, self.logs),
            "search": (SearchRequest, self.search),
            "resolve": (ResolveRequest, self.resolve),
            "status": (Request, self.status),
        }
        return [Endpoint("history", verb, request, handler) for verb, (request, handler) in verbs.items()]

    def close(self) -> None:
        """Take no more questions; those under way are answered."""
        self.reads.close()

    async def runs(self, scope: Scope, request: RunsRequest) -> RunsPage:
        """A page of runs."""
        filters = {
            "status": request.status,
            "task_id": request.task,
            "session_id": request.session,
            "workspace_id": request.workspace,
        }
        found = await self._page("run", scope, request, filters, since=request.since)
        return RunsPage(runs=found.records, next=found.next)

    async def sessions(self, scope: Scope, request: SessionsRequest) -> SessionsPage:
        """A page of sessions."""
        filters = {
            "status": request.status,
            "task_id": request.task,
            "workspace_id": request.workspace,
            "external_id": request.external_id,
        }
        found = await self._page("session", scope, request, filters, since=request.since)
        return SessionsPage(sessions=found.records, next=found.next)

    async def workspaces(self, scope: Scope, request: WorkspacesRequest) -> WorkspacesPage:
        """A page of workspaces."""
        filters = {"state": request.state, "tags": request.tag}
        found = await self._page("workspace", scope, request, filters, since=request.since)
        return WorkspacesPage(workspaces=found.records, next=found.next)

    async def tokens(self, scope: Scope, request: TokensRequest) -> TokensPage:
        """A page of tokens."""
        filters = {
            "status": request.status,
            "tags": request.tag,
            "run_id": request.run,
            "session_id": request.session,
        }
        found = await self._page("token", scope, request, filters, since=request.since)
        return TokensPage(tokens=found.records, next=found.next)

    async def access(self, scope: Scope, request: AccessRequest) -> AccessPage:
        """A page of access tokens."""
        filters = {"status": request.status, "session_id": request.session}
        found = await self._page("access", scope, request, filters, since=request.since)
        return AccessPage(access=found.records, next=found.next)

    async def deployments(self, scope: Scope, request: DeploymentsRequest) -> DeploymentsPage:
        """A page of deployments."""
        found = await self._page("deployment", scope, request, {})
        return DeploymentsPage(deployments=found.records, next=found.next)

    async def events(self, scope: Scope, request: EventsRequest) -> EventsPage:
        """A page of a run's events."""
        _require_limit(request.limit)
        await self._fresh(request)
        found, terminal = await self.reads.events(scope, request.run_id, after=request.after, limit=request.limit)
        return EventsPage(events=found, terminal=terminal)

    async def logs(self, scope: Scope, request: LogsRequest) -> LogsPage:
        """A page of a run's log."""
        _require_limit(request.limit)
        await self._fresh(request, logs=True)
        found, more = await self.reads.chunks(
            scope,
            request.run_id,
            attempt=request.attempt,
            stream=request.stream,
            after=request.after_seq,
            limit=request.limit,
        )
        return LogsPage(chunks=found, more=more)

    async def search(self, scope: Scope, request: SearchRequest) -> SearchPage:
        """A piece of a search through the logs, oldest first."""
        names = ("pattern", "regex", "ignore_case", "task", "run_id", "stream", "context")
        chosen = {name: getattr(request, name) for name in names}
        wanted = Wanted(**chosen, since=point_in_time(request.since))
        await self._fresh(request, logs=True)
        found, following = await self.reads.search(scope, wanted, request.after)
        return SearchPage(matches=found, next=following)

    async def resolve(self, scope: Scope, request: ResolveRequest) -> Resolved:
        """Ids by prefix."""
        if not request.last and not request.prefix:
            raise UsageError("resolve needs a prefix, or last")
        await self._fresh(request)
        return Resolved(ids=await self.reads.resolve(request.entity, scope, request.prefix, last=request.last))

    async def status(self, _scope: Scope, request: Request) -> HistoryStatus:
        """How far the projection is."""
        await self._fresh(request, logs=True)
        streams = {}
        for lane in (self.projector.history, self.projector.logs):
            for stream, reader in lane.readers.items():
                last, applied = await reader.last(), lane.applied[stream]
                waiting = await reader.stored_after(applied) if last > applied else None
                lag = max((datetime.now(UTC) - waiting).total_seconds(), 0.0) if waiting else 0.0
                streams[stream] = StreamStatus(applied=applied, last=last, lag_seconds=round(lag, 3))
        return HistoryStatus(streams=streams, version=__version__)

    def _one(self, entity: Entity) -> Callable[[Scope, Ref], Any]:
        async def answer(scope: Scope, request: Ref) -> Any:
            await self._fresh(request)
            return await self.reads.one(entity, scope, request.id)

        return answer

    async def _page(
        self, entity: Entity, scope: Scope, request: Any, filters: dict[str, Any], since: str | float | None = None
    ) -> Found:
        _require_limit(request.limit)
        oldest = None if since is None else point_in_time(since)
        await self._fresh(request)
        return await self.reads.page(entity, scope, filters, since=oldest, limit=request.limit, before=request.before)

    async def _fresh(self, request: Request, *, logs: bool = False) -> None:
        if request.fresh:
            await self.projector.fresh(logs=logs, timeout=FRESHNESS_DEADLINE)


def _require_limit(limit: int) -> None:
    if not 1 <= limit <= 1000:
        raise UsageError(f"limit is {limit}, not 1 to 1000")
