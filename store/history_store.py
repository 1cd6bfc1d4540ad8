"""What a database must do to be the history: the interface that projector, canned questions and users' SQL stand on.

DuckDB (:class:`store.sinks.Store`) is the first implementation; ``tests/sqlite_store.py`` has another, small one, and
``tests/integration/test_history_store.py`` holds both to what is promised here. How to add one is told in
``docs/explanation/stores.md``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from helmr.chunks import LogChunk
from helmr.models import Event, LogMatch
from helmr.subjects import Scope
from store.question import QueryRequest, Summary
from store.steps import Batch, Prepared

if TYPE_CHECKING:
    from store.projector import Projector
    from store.search import Wanted

Entity = Literal["run", "session", "workspace", "token", "access", "deployment"]

#: Takes a part of a result.
Send = Callable[[bytes], Awaitable[None]]


class Sink(Protocol):
    """What a lane of the projector writes into. Both methods run in threads, each one call at a time.

    Rows and watermarks must become visible, and durable, together: whatever kills the process, the next one goes on after
    ``applied`` and neither loses nor doubles a row. :mod:`store.steps` makes the rows.
    """

    #: By stream, the last sequence whose effect is stored, as of the last process at first.
    applied: dict[str, int]
    #: By stream, when it was created; what is put in here is to be stored with the next watermark.
    created: dict[str, str]

    def prepare(self, batch: Batch) -> Prepared:
        """Make rows of the messages; those that were prepared before are passed over."""
        ...

    def store(self, prepared: Prepared) -> None:
        """Write the rows and advance ``applied``; called in the order prepared. An error ends the process."""
        ...


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A page of records as JSON, newest first; ``next`` is ``before`` for the following page, None at the end."""

    records: list[msgspec.Raw]
    next: str | None


class Reads(Protocol):
    """The canned questions. Each is asked within one project and environment, and sees nothing of others.

    An answer fits into one message of NATS (:data:`store.reads.PAGE_BYTES`). All raise ``TimedOut`` after the deadline of the
    store, ``Unavailable`` when the database cannot answer, and ``NotFound`` for an id that is not there.
    """

    async def one(self, entity: Entity, scope: Scope, entity_id: str) -> Any:
        """The record of this complete id; ``NotFound`` if there is none."""
        ...

    async def page(
        self,
        entity: Entity,
        scope: Scope,
        filters: Mapping[str, str | list[str] | None],
        *,
        since: datetime | None,
        limit: int,
        before: str | None,
    ) -> Found:
        """The newest ``limit`` (1 to 1000) records, created no earlier than ``since`` and older than the one ``before``.

        ``filters``: by column, what it must be, or one of what; ``tags`` must have one of what is given.
        """
        ...

    async def resolve(self, entity: Entity, scope: Scope, prefix: str | None, *, last: bool) -> list[str]:
        """The ids that begin with ``prefix`` (or have it as their other name), newest first, at most ten; or the last id."""
        ...

    async def events(self, scope: Scope, run_id: str, *, after: int, limit: int) -> tuple[list[Event], bool]:
        """A run's events beyond cursor ``after``, oldest first; and whether the last of them ends it."""
        ...

    async def chunks(
        self, scope: Scope, run_id: str, *, attempt: int | None, stream: str | None, after: int, limit: int
    ) -> tuple[list[LogChunk], bool]:
        """A run's log chunks beyond sequence ``after``, in the order stored; and whether there may be more."""
        ...

    async def search(self, scope: Scope, wanted: Wanted, after: str | None) -> tuple[list[LogMatch], str | None]:
        """Lines of logs, oldest first: a bounded piece of work; the second part is ``after`` for the next, None at the end."""
        ...

    def close(self) -> None:
        """Let go of what belongs to the answers; requests under way are finished."""
        ...


class Sql(Protocol):
    """Runs what users write. Nothing in a statement may write, reach another project, or outlive its deadline."""

    async def start(self) -> None:
        """Be ready for a query."""
        ...

    async def run(self, scope: Scope, request: QueryRequest, send: Send) -> Summary:
        """Run a query; ``send`` gets the result, Arrow or JSON lines, in parts of at most half a megabyte.

        Raises:
            UsageError: the query is not possible.
            TimedOut: it did not end in time, waiting for others included.
            HelmrError: it needs too much memory.
        """
        ...

    async def close(self) -> None:
        """End what is running."""
        ...


class HistoryStore(Protocol):
    """A history, opened by the one process that may write it."""

    @property
    def history(self) -> Sink:
        """Where RUNS, SESSIONS and the configuration go."""
        ...

    @property
    def logs(self) -> Sink:
        """Where LOGS goes."""
        ...

    def answers(self) -> Reads:
        """What answers the canned questions, beside the sinks."""
        ...

    def sql(self, projector: Projector) -> Sql:
        """What runs users' SQL over what ``projector`` has applied."""
        ...

    def close(self) -> None:
        """Store what is pending and let go; closing twice is fine."""
        ...
