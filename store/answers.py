"""Answers the canned questions from DuckDB, each in a thread, with a deadline.

Every question reads with a cursor and a read-only transaction of its own, in one of four threads, and is interrupted at
its deadline: a reader that stays open would keep the database from checkpointing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from helmr.chunks import LogChunk
from helmr.errors import HelmrError, TimedOut, Unavailable, UsageError
from helmr.models import Event, LogMatch
from helmr.subjects import Scope
from store import reads, search
from store.reads import LOG_PAGE_BYTES, NOUNS, Cursor
from store.search import Wanted

if TYPE_CHECKING:
    from store.history_store import Entity, Found
    from store.sinks import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds a canned question may take.
DEADLINE = 5.0
#: Questions answered at the same time; on two cores more would only slow each other down.
THREADS = 4


class Answers:
    """DuckDB's :class:`store.history_store.Reads`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="history")
        self._limit = asyncio.Semaphore(THREADS)

    def close(self) -> None:
        """Let go of the threads; questions under way are finished."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def one(self, entity: Entity, scope: Scope, entity_id: str) -> Any:
        """The record of this id."""
        return await self.read(reads.one(NOUNS[entity], scope, entity_id))

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
        """The newest records."""
        return await self.read(reads.page(NOUNS[entity], scope, filters, since=since, limit=limit, before=before))

    async def resolve(self, entity: Entity, scope: Scope, prefix: str | None, *, last: bool) -> list[str]:
        """Ids by prefix, or the last one."""
        return await self.read(reads.resolve(NOUNS[entity], scope, prefix, last=last))

    async def events(self, scope: Scope, run_id: str, *, after: int, limit: int) -> tuple[list[Event], bool]:
        """A run's events, archived or not."""
        return await self.read(reads.events(scope, run_id, self.store.home.archive, after=after, limit=limit))

    async def chunks(
        self, scope: Scope, run_id: str, *, attempt: int | None, stream: str | None, after: int, limit: int
    ) -> tuple[list[LogChunk], bool]:
        """A run's log chunks, from as many daily files as it takes."""
        run = await self.read(lambda cursor: reads.run_bounds(cursor, scope, run_id))
        found: list[LogChunk] = []
        room = LOG_PAGE_BYTES
        for day in reads.log_days(run, self.store.logs.days()):
            seen, left = found[-1].seq if found else after, limit - len(found)
            read = reads.chunks(run_id, attempt=attempt, stream=stream, after=seen, room=room, limit=left)
            listed = await self.read(read, day=day)
            found += listed
            room -= sum(len(chunk.data) + 200 for chunk in listed)
            if room <= 0 or len(found) >= limit:
                return found, True
        return found, False

    async def search(self, scope: Scope, wanted: Wanted, after: str | None) -> tuple[list[LogMatch], str | None]:
        """A piece of a search through the daily log files, oldest first."""
        await asyncio.to_thread(search.require, wanted)
        begin, beyond = _place(after, wanted.since)
        days = [day for day in self.store.logs.days() if day >= begin]
        for day, following in itertools.zip_longest(days, days[1:]):
            found, seq = await self.read(search.piece(scope, wanted, after=beyond if day == begin else 0), day=day)
            if seq is not None:
                return found, f"{day}:{seq}"
            if found:
                return found, f"{following}:0" if following else None
        return [], None

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


def _place(after: str | None, since: datetime | None) -> tuple[str, int]:
    """The day a search goes on in, and the sequence it goes on after."""
    if after is None:
        return since.astimezone(UTC).strftime("%Y%m%d") if since else "", 0
    day, _, seq = after.partition(":")
    if not (day.isdigit() and seq.isdigit()):
        raise UsageError(f"after is {after!r}, not the next of a reply")
    return day, int(seq)


def _late() -> TimedOut:
    return TimedOut(f"the history did not answer within {DEADLINE:g} s", hint="ask for less, or ask again")
