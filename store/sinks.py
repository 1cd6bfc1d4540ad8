"""Writes batches of log messages into DuckDB: one transaction each, with the last applied sequence in it.

Because watermark and rows commit together, a process killed at any moment neither loses nor doubles a row. A failed
write is not repaired in place: the process ends, and the next one begins from the watermark.
"""

# every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import duckdb
import msgspec
import pyarrow.lib as pa

from bus import topology
from bus.reader import Message
from helmr.errors import Unavailable
from store import files, schema, tables
from store.fold import Fold, Row, restore
from store.home import Home
from store.log_fold import day_of, row_of
from store.messages import instant
from store.staging import Writer, staged

log = logging.getLogger(__name__)

Batch = Mapping[str, list[Message]]


class Step(NamedTuple):
    """One transaction: the rows for the tables of one database, and the watermarks that go with them.

    ``replaced``: by table, the ids whose former rows go. ``runs``: rows of runs, which may lack what only the former ones tell.
    """

    place: str
    tables: dict[str, pa.Table]
    marks: dict[str, int]
    replaced: Mapping[str, list[str]] = MappingProxyType({})
    runs: Sequence[Row] = ()


Prepared = list[Step]
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, msgspec.MsgspecError)


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
        scan = home.suspect.exists()
        files.attach(con, home.history, "h", schema.history_ddl(), tables.HISTORY_ROW_GROUP, scan=scan)
        home.suspect.unlink(missing_ok=True)
        self._cursor = con.cursor()
        self._cursor.execute("USE h")
        self._writer = Writer(self._cursor, tables.HISTORY_TABLES, schema.REPLACED, schema.CARRIED)
        #: Watermarks that no row has come with: they are stored with the next one, and mean nothing until then.
        self._due: dict[str, int] = {}
        self.created: dict[str, str] = {}
        self.applied: dict[str, int] = {}
        for stream, (seq, created) in _load_marks(self._cursor).items():
            self.applied[stream] = seq
            if created:
                self.created[stream] = created
        #: Per stream, the last sequence that is folded; what comes later only moves the watermark.
        self.until: Mapping[str, int] | None = None
        self._prepared = dict(self.applied)
        self._fold = Fold(open_runs=restore(self._cursor.sql(schema.LOAD_LIVE).to_arrow_table().to_pylist()))
        self._folds: dict[str, Callable[[Message], None]] = {
            topology.RUNS: self._fold.event,
            topology.SESSIONS: self._fold.record,
            topology.CONFIG: self._fold.config,
        }

    def prepare(self, batch: Batch) -> Prepared:
        """Fold a batch; messages at or below what was prepared before are passed over."""
        marks: dict[str, int] = {}
        for stream, messages in batch.items():
            fold, seq = self._folds[stream], self._prepared.get(stream, 0)
            until = _end(self.until, stream)
            for message in messages:
                if seq < message.seq <= until:
                    self._fold_one(stream, fold, message)
                seq = max(seq, message.seq)
            if seq > self._prepared.get(stream, 0):
                marks[stream] = seq
        self._prepared.update(marks)
        replaced, rows = self._fold.replaced(), self._fold.take()
        runs = rows.pop("runs_live", [])
        rows |= _split("sessions", _SESSION_ENDED, rows.pop("sessions_live", []))
        return [Step("h", {name: staged(_TABLES[name], found) for name, found in rows.items()}, marks, replaced, runs)]

    def _fold_one(self, stream: str, fold: Callable[[Message], None], message: Message) -> None:
        try:
            fold(message)
        except _UNREADABLE as error:
            log.exception("%s #%s (%s) cannot be understood, passed over", stream, message.seq, message.subject)
            self._fold.unreadable(stream, message, f"{type(error).__name__}: {error}")

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
                runs = _carry(step.runs, carried.get("runs_live", []))
                for name, rows in _split("runs", _RUN_ENDED, runs).items():
                    self._writer.insert(name, staged(_TABLES[name], rows))
                for name, found in step.tables.items():
                    self._writer.insert(name, found)
                self._writer.mark(self._due, self.created, instant(time.time_ns()))
        except duckdb.Error as error:
            if files.damaged(error):
                self.home.suspect.touch()
            raise
        self._due.clear()

    def close(self) -> None:
        """Let go of the file."""
        self._cursor.close()


_TABLES = {table.name: table for table in tables.HISTORY_TABLES}
_RUN_ENDED, _SESSION_ENDED = tables.RUNS.names.index("finished_at"), tables.SESSIONS.names.index("finished_at")
_RUN_CARRIED = [(at, name) for at, name in enumerate(tables.RUNS.names) if name in tables.RUN_SPEC_COLUMNS]


def _split(noun: str, ended: int, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows for the tables of what is open and of what has ended; the latter may have fewer columns."""
    width = len(_TABLES[f"{noun}_closed"].columns)
    live = [row for row in rows if row[ended] is None]
    closed = [row[:width] for row in rows if row[ended] is not None]
    return {name: found for name, found in ((f"{noun}_live", live), (f"{noun}_closed", closed)) if found}


def _carry(runs: Sequence[Row], former: list[dict[str, Any]]) -> Sequence[Row]:
    """The rows of runs, with what the first event of each told taken over from the former row."""
    if not former:
        return runs
    known = {row["id"]: row for row in former}
    return [_completed(row, known[row[0]]) if row[0] in known else row for row in runs]


def _completed(row: Row, former: dict[str, Any]) -> Row:
    made = list(row)
    for at, name in _RUN_CARRIED:
        if made[at] is None:
            made[at] = former[name]
    return tuple(made)


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
        self.until: Mapping[str, int] | None = None
        self._prepared = self.applied.get(topology.LOGS, 0)
        self._latest = self.day or ""

    def prepare(self, batch: Batch) -> Prepared:
        """Make rows of a batch, day by day; messages at or below what was prepared before are passed over."""
        fresh = [message for message in batch.get(topology.LOGS, []) if message.seq > self._prepared]
        until = _end(self.until, topology.LOGS)
        steps = []
        for day, group in itertools.groupby(fresh, key=self._day):
            messages = list(group)
            rows = [row for m in messages if m.seq <= until and (row := _row(m)) is not None]
            rows_of = {"logs": staged(tables.LOGS, rows)} if rows else {}
            steps.append(Step(day, rows_of, {topology.LOGS: messages[-1].seq}))
        if fresh:
            self._prepared = fresh[-1].seq
        return steps

    def _day(self, message: Message) -> str:
        """A clock that is set back must not bring back a finished file."""
        self._latest = max(day_of(message), self._latest)
        return self._latest

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

    def close(self) -> None:
        """Let go of the files."""
        self._cursor.close()


def _end(until: Mapping[str, int] | None, stream: str) -> int:
    return sys.maxsize if until is None else until.get(stream, 0)


def _row(message: Message) -> Row | None:
    try:
        return row_of(message)
    except _UNREADABLE:
        log.exception("LOGS #%s (%s) cannot be understood, passed over", message.seq, message.subject)
        return None


class Store:
    """The open files of a home: both sinks, and cursors for readers."""

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

    def close(self) -> None:
        """Checkpoint, close the files and give up the lock; closing twice is fine."""
        if self._con is not None:
            self._con.close()
            self._con = None
        self._lock.close()
