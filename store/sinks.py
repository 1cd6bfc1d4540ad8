"""Writes batches of log messages into DuckDB: one transaction each, with the last applied sequence in it.

Because watermark and rows commit together, a process killed at any moment neither loses nor doubles a row. A failed
write is not repaired in place: the process ends, and the next one begins from the watermark.
"""

# every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from bus import topology
from helmr.errors import Unavailable
from store import files, schema, tables
from store.answers import Answers
from store.home import Home, journal_of
from store.messages import instant
from store.projector import BATCH, Projector
from store.sandboxes import Sandboxes
from store.staging import Writer
from store.steps import Batch, HistorySteps, LogSteps, Prepared, Step, rows_of_step

log = logging.getLogger(__name__)

#: Bytes of write-ahead log after which a history that keeps up is checkpointed, long before DuckDB would do so by itself: the
#: longest transaction takes half as long, and small ones get cheaper (the deleted rows of live tables go). With batches
#: of thousands of events, as when it catches up, each checkpoint so early would make an event a third dearer.
EARLY = 16 * 1024**2
FEW = BATCH // 2


@contextmanager
def transaction(cursor: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit what the block does, or nothing of it."""
    cursor.execute("BEGIN")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        try:
            cursor.execute("ROLLBACK")
        except duckdb.Error as error:  # the commit itself failed: there is nothing left to roll back
            log.debug("rollback: %s", error)
        raise


def _load_marks(cursor: duckdb.DuckDBPyConnection) -> dict[str, tuple[int, str | None]]:
    rows = cursor.execute(schema.LOAD_MARKS).fetchall()
    return {stream: (seq, created) for stream, seq, created in rows}


class HistorySink:
    """Writes RUNS, SESSIONS and the configuration into ``history.db``."""

    def __init__(self, con: duckdb.DuckDBPyConnection, home: Home) -> None:
        self.home = home
        self._journal = journal_of(home.history)
        scan = home.suspect.exists()
        files.attach(con, home.history, "h", schema.history_ddl(), tables.HISTORY_ROW_GROUP, scan=scan)
        home.suspect.unlink(missing_ok=True)
        self._cursor = con.cursor()
        self._cursor.execute("USE h")
        self._writer = Writer(self._cursor, tables.HISTORY_TABLES, schema.REPLACED, schema.CARRIED)
        #: Watermarks that no row has come with: they are stored with the next one, and mean nothing until then.
        self._due: dict[str, int] = {}
        #: Transactions that changed rows, those of the archive included: a copy taken at the same count is as good as new.
        self.changes = 0
        marks = _load_marks(self._cursor)
        self.applied: dict[str, int] = {stream: seq for stream, (seq, _) in marks.items()}
        self.created: dict[str, str] = {stream: created for stream, (_, created) in marks.items() if created}
        open_runs = self._cursor.sql(schema.LOAD_LIVE).to_arrow_table().to_pylist()
        self.steps = HistorySteps(marks, open_runs)

    def prepare(self, batch: Batch) -> Prepared:
        """Fold a batch."""
        return self.steps.prepare(batch)

    def store(self, prepared: Prepared) -> None:
        """Write what was prepared, in one transaction with its watermarks."""
        for step in prepared:
            self._due.update(step.marks)
            if step.tables or step.runs or step.replaced:
                self._commit(step)
            self.applied.update(step.marks)

    def _commit(self, step: Step) -> None:
        try:
            with transaction(self._cursor):
                carried = {name: self._writer.remove(name, ids) for name, ids in step.replaced.items()}
                for name, rows in rows_of_step(step, carried.get("runs_live", [])).items():
                    self._writer.insert(name, rows)
                self._writer.mark(self._due, self.created, instant(time.time_ns()))
            if sum(rows.num_rows for rows in step.tables.values()) < FEW:
                self._checkpoint()
        except duckdb.Error as error:
            if files.damaged(error):
                self.home.suspect.touch()
            raise
        self._due.clear()
        self.changes += 1

    def _checkpoint(self) -> None:
        if self._journal.exists() and self._journal.stat().st_size >= EARLY:
            try:
                self._cursor.execute("CHECKPOINT h")
            except duckdb.TransactionException as error:  # somebody is in the way: after the next batch
                log.debug("checkpoint: %s", error)

    def close(self) -> None:
        """Let go of the file."""
        self._cursor.close()


class LogSink:
    """Writes LOGS into one file per day; a finished day is attached read-only, and only when somebody asks for it."""

    def __init__(self, con: duckdb.DuckDBPyConnection, home: Home) -> None:
        self.home = home
        self._con = con
        self._cursor = con.cursor()
        self._attaching = threading.Lock()
        self._finished: set[str] = set()
        self.created: dict[str, str] = {}
        self.applied: dict[str, int] = {}
        self.day: str | None = None
        self._writer: Writer | None = None
        days = home.days()
        if days:
            self._begin(days[-1])
        for day in reversed(days[:-1]):
            if self.applied:
                break
            # The newest file is empty, e.g. because it was moved aside: the one before says where to go on.
            self.use(self._cursor, day)
            self._note(_load_marks(self._cursor))
        self.steps = LogSteps(self.applied.get(topology.LOGS, 0), self.day)

    def prepare(self, batch: Batch) -> Prepared:
        """Make rows of a batch."""
        return self.steps.prepare(batch)

    def store(self, prepared: Prepared) -> None:
        """Write what was prepared: one transaction per day, in the order of the log."""
        for step in prepared:
            writer = self._writer_of(step.place)
            with transaction(self._cursor):
                for name, rows in step.tables.items():
                    writer.insert(name, rows)
                writer.mark(step.marks, self.created, instant(time.time_ns()))
            self.applied.update(step.marks)

    def _writer_of(self, day: str) -> Writer:
        if day != self.day:
            self._begin(day)
        if self._writer is None:
            self._cursor.execute(f"USE logs_{day}")
            self._writer = Writer(self._cursor, [tables.LOGS], {}, {})
        return self._writer

    def _begin(self, day: str) -> None:
        """Finish the present day's file and go on in another: only the newest ever has a write-ahead log."""
        with self._attaching:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self.day is not None:
                self._cursor.execute("USE memory")
                self._cursor.execute(f"CHECKPOINT logs_{self.day}")
                self._cursor.execute(f"DETACH logs_{self.day}")
            self.home.logs.mkdir(parents=True, exist_ok=True)
            alias = f"logs_{day}"
            files.attach(self._cursor, self.home.day(day), alias, schema.logs_ddl(), tables.LOGS_ROW_GROUP)
            self.day = day
            self._note(_load_marks(self._cursor))

    def _note(self, marks: dict[str, tuple[int, str | None]]) -> None:
        for stream, (seq, created) in marks.items():
            self.applied[stream] = max(seq, self.applied.get(stream, 0))
            if created:
                self.created.setdefault(stream, created)

    def forget(self, day: str) -> None:
        """Delete the file of a finished day: its chunks are in the archive, or no longer wanted."""
        with self._attaching:
            self._cursor.execute(f"DETACH DATABASE IF EXISTS logs_{day}")
            self._finished.discard(day)
            self.home.day(day).unlink(missing_ok=True)

    def use(self, cursor: duckdb.DuckDBPyConnection, day: str) -> None:
        """Point a cursor at a day's log, wherever it is, under the name ``logs``; may wait for a day to be finished."""
        with self._attaching:
            if day != self.day and not self.home.day(day).exists():
                cursor.execute("USE memory")
                body = schema.cold(tables.LOGS, [self.home.cold_day(day)])
                cursor.execute(f"CREATE OR REPLACE TEMP VIEW logs AS {body}")
                return
            if day not in self._finished and day != self.day:
                cursor.execute(f"ATTACH IF NOT EXISTS {files.quoted(self.home.day(day))} AS logs_{day} (READ_ONLY)")
                self._finished.add(day)
        cursor.execute(f"USE logs_{day}")

    def days(self) -> list[str]:
        """The days with logs, oldest first."""
        hot = [day for day in self.home.days() if self.day is None or day <= self.day]
        return sorted({*hot, *self.home.cold_days()})

    def checkpoint(self) -> None:
        """Bring what was written into the file of the day itself."""
        if self.day is not None:
            self._cursor.execute(f"CHECKPOINT logs_{self.day}")

    def close(self) -> None:
        """Let go of the files."""
        self._cursor.close()


class Store:
    """The open files of a home: DuckDB's :class:`store.history_store.HistoryStore`."""

    def __init__(self, home: Home) -> None:
        home.make()
        self.home = home
        self._lock = home.lock()
        self._con: duckdb.DuckDBPyConnection | None = None
        try:
            self._con = files.instance(home.scratch)
            self.history = HistorySink(self._con, home)
            self.logs = LogSink(self._con, home)
        except BaseException:
            self.close()
            raise

    def answers(self) -> Answers:
        """What answers the canned questions."""
        return Answers(self)

    def sql(self, projector: Projector) -> Sandboxes:
        """What runs users' SQL."""
        return Sandboxes(self, projector)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A new cursor, one request each; :meth:`use` says what it reads."""
        if self._con is None:
            raise Unavailable("the history is closed")
        return self._con.cursor()

    def use(self, cursor: duckdb.DuckDBPyConnection, day: str | None = None) -> None:
        """Point a cursor at the history, or at the log of a day."""
        if day is None:
            cursor.execute("USE h")
        else:
            self.logs.use(cursor, day)

    def checkpoint(self) -> None:
        """Bring all that was written into the files themselves: closing them tries, and does not say whether it could.

        Raises:
            duckdb.Error: it could not be done, for instance because the disk is full.
        """
        self.cursor().execute("CHECKPOINT h")
        self.logs.checkpoint()

    def close(self) -> None:
        """Checkpoint, close the files and give up the lock; closing twice is fine."""
        if self._con is not None:
            self._con.close()
            self._con = None
        self._lock.close()
