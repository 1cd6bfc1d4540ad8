"""Answers the canned questions about the past over request/reply, from within the projector's process.

Every request reads with a cursor and a read-only transaction of its own, in one of four threads, and is interrupted at
its deadline: a reader that stays open would keep the database from checkpointing. Free SQL is for :mod:`store.queries`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, Literal, TypeVar

import duckdb
import msgspec

from bus.services.endpoint import Endpoint
from helmr.chunks import LogChunk
from helmr.errors import HelmrError, TimedOut, Unavailable, UsageError
from helmr.models import Event, LogMatch
from helmr.subjects import Scope
from helmr.version import __version__
from store import reads, search
from store.projector import FRESHNESS_DEADLINE, Projector
from store.reads import LOG_PAGE_BYTES, NOUNS, Cursor
from store.search import Wanted

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds a canned question may take.
DEADLINE = 5.0
#: Questions answered at the same time; on two cores more would only slow each other down.
THREADS = 4


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

    entity: Literal["run", "session", "workspace", "deployment"]
    prefix: str | None = None
    last: bool = False


class Resolved(msgspec.Struct, kw_only=True):
    """At most ten ids, newest first."""

    ids: list[str]


class StreamStatus(msgspec.Struct, kw_only=True):
    """How far a stream has been applied; ``lag_seconds`` is the age of the last applied message while there are more."""

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
        self.store = projector.store
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="history")
        self._limit = asyncio.Semaphore(THREADS)

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        verbs: dict[str, tuple[type[Any], Any]] = {
            "runs": (RunsRequest, self.runs),
            "run": (Ref, self._one("run")),
            "sessions": (SessionsRequest, self.sessions),
            "session": (Ref, self._one("session")),
            "workspaces": (WorkspacesRequest, self.workspaces),
            "workspace": (Ref, self._one("workspace")),
            "deployments": (DeploymentsRequest, self.deployments),
            "events": (EventsRequest, self.events),
            "logs": (LogsRequest, self.logs),
            "search": (SearchRequest, self.search),
            "resolve": (ResolveRequest, self.resolve),
            "status": (Request, self.status),
        }
        return [Endpoint("history", verb, request, handler) for verb, (request, handler) in verbs.items()]

    def close(self) -> None:
        """Let go of the threads; requests under way are finished."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def runs(self, scope: Scope, request: RunsRequest) -> RunsPage:
        """A page of runs."""
        filters = {
            "status": request.status,
            "task_id": request.task,
            "session_id": request.session,
            "workspace_id": request.workspace,
        }
        found, following = await self._page("run", scope, request, filters, since=request.since)
        return RunsPage(runs=found, next=following)

    async def sessions(self, scope: Scope, request: SessionsRequest) -> SessionsPage:
        """A page of sessions."""
        filters = {
            "status": request.status,
            "task_id": request.task,
            "workspace_id": request.workspace,
            "external_id": request.external_id,
        }
        found, following = await self._page("session", scope, request, filters, since=request.since)
        return SessionsPage(sessions=found, next=following)

    async def workspaces(self, scope: Scope, request: WorkspacesRequest) -> WorkspacesPage:
        """A page of workspaces."""
        found, following = await self._page("workspace", scope, request, {"state": request.state}, since=request.since)
        return WorkspacesPage(workspaces=found, next=following)

    async def deployments(self, scope: Scope, request: DeploymentsRequest) -> DeploymentsPage:
        """A page of deployments."""
        found, following = await self._page("deployment", scope, request, {})
        return DeploymentsPage(deployments=found, next=following)

    async def events(self, scope: Scope, request: EventsRequest) -> EventsPage:
        """A page of a run's events."""
        _require_limit(request.limit)
        await self._fresh(request)
        read = reads.events(scope, request.run_id, self.store.home.archive, after=request.after, limit=request.limit)
        found, terminal = await self.read(read)
        return EventsPage(events=found, terminal=terminal)

    async def logs(self, scope: Scope, request: LogsRequest) -> LogsPage:
        """A page of a run's log, from as many daily files as it takes."""
        _require_limit(request.limit)
        await self._fresh(request, logs=True)
        run = await self.read(lambda cursor: reads.run_bounds(cursor, scope, request.run_id))
        days, _, _ = reads.log_days(run, self.store.logs.days())
        found: list[LogChunk] = []
        room = LOG_PAGE_BYTES
        for day in days:
            after = found[-1].seq if found else request.after_seq
            read = reads.chunks(
                request.run_id,
                attempt=request.attempt,
                stream=request.stream,
                after=after,
                room=room,
                limit=request.limit - len(found),
            )
            listed = await self.read(read, day=day)
            found += listed
            room -= sum(len(chunk.data) + 200 for chunk in listed)
            if room <= 0 or len(found) >= request.limit:
                return LogsPage(chunks=found, more=True)
        return LogsPage(chunks=found, more=False)

    async def search(self, scope: Scope, request: SearchRequest) -> SearchPage:
        """A piece of a search through the daily log files, oldest first."""
        since = reads.point_in_time(request.since)
        names = ("pattern", "regex", "ignore_case", "task", "run_id", "stream", "context")
        wanted = Wanted(**{name: getattr(request, name) for name in names}, since=since)
        await asyncio.to_thread(search.require, wanted)
        await self._fresh(request, logs=True)
        begin, after = _place(request.after, since)
        days = [day for day in self.store.logs.days() if day >= begin]
        for day, following in itertools.zip_longest(days, days[1:]):
            found, seq = await self.read(search.piece(scope, wanted, after=after if day == begin else 0), day=day)
            if seq is not None:
                return SearchPage(matches=found, next=f"{day}:{seq}")
            if found:
                return SearchPage(matches=found, next=f"{following}:0" if following else None)
        return SearchPage(matches=[], next=None)

    async def resolve(self, scope: Scope, request: ResolveRequest) -> Resolved:
        """Ids by prefix."""
        if not request.last and not request.prefix:
            raise UsageError("resolve needs a prefix, or last")
        await self._fresh(request)
        read = reads.resolve(NOUNS[request.entity], scope, request.prefix, last=request.last)
        return Resolved(ids=await self.read(read))

    async def status(self, _scope: Scope, request: Request) -> HistoryStatus:
        """How far the projection is."""
        await self._fresh(request, logs=True)
        streams = {}
        for lane in (self.projector.history, self.projector.logs):
            for stream, reader in lane.readers.items():
                last, applied = await reader.last(), lane.applied[stream]
                behind = last > applied and not (applied == reader.received and await reader.exhausted())
                lag = max(time.time() - lane.stored_ns[stream] / 1e9, 0.0) if behind else 0.0
                streams[stream] = StreamStatus(applied=applied, last=last, lag_seconds=round(lag, 3))
        return HistoryStatus(streams=streams, version=__version__)

    def _one(self, noun: str) -> Callable[[Scope, Ref], Any]:
        async def answer(scope: Scope, request: Ref) -> Any:
            await self._fresh(request)
            return await self.read(reads.one(NOUNS[noun], scope, request.id))

        return answer

    async def _page(
        self, noun: str, scope: Scope, request: Any, filters: dict[str, Any], since: str | float | None = None
    ) -> tuple[list[msgspec.Raw], str | None]:
        read = reads.page(NOUNS[noun], scope, filters, since=since, limit=request.limit, before=request.before)
        await self._fresh(request)
        return await self.read(read)

    async def _fresh(self, request: Request, *, logs: bool = False) -> None:
        if request.fresh:
            await self.projector.fresh(logs=logs, timeout=FRESHNESS_DEADLINE)

    async def read(self, read: Callable[[Cursor], T], *, day: str | None = None) -> T:
        """Call ``read`` with a cursor over the history, or over the log of a ``day``, in a read-only transaction.

        Raises:
            TimedOut: it took longer than the deadline, waiting for a thread included.
            Unavailable: the database cannot answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE
        try:
            async with asyncio.timeout_at(deadline):
                await self._limit.acquire()
        except TimeoutError:
            raise _late() from None
        cursor = self.store.cursor()
        alarm = loop.call_at(deadline, cursor.interrupt)
        work = loop.run_in_executor(self._threads, self._transact, cursor, day, read)
        work.add_done_callback(lambda _: self._limit.release())
        try:
            return await work
        finally:
            alarm.cancel()

    def _transact(self, cursor: Cursor, day: str | None, read: Callable[[Cursor], T]) -> T:
        try:
            self.store.use(cursor, day)
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            return read(cursor)
        except duckdb.InterruptException:
            raise _late() from None
        except HelmrError:
            raise
        except duckdb.Error as error:
            log.exception("a question failed")
            raise Unavailable(f"the history cannot answer: {error}") from error
        finally:
            cursor.close()


def _place(after: str | None, since: datetime) -> tuple[str, int]:
    """The day a search goes on in, and the sequence it goes on after."""
    if after is None:
        return since.strftime("%Y%m%d"), 0
    day, _, seq = after.partition(":")
    if not (day.isdigit() and seq.isdigit()):
        raise UsageError(f"after is {after!r}, not the next of a reply")
    return day, int(seq)


def _late() -> TimedOut:
    return TimedOut(f"the history did not answer within {DEADLINE:g} s", hint="ask for less, or ask again")


def _require_limit(limit: int) -> None:
    if not 1 <= limit <= 1000:
        raise UsageError(f"limit is {limit}, not 1 to 1000")
