"""Makes rows of messages: what of the projection is the same whatever database the rows go into.

A batch becomes steps, each of them one transaction of rows and watermarks. Folding needs no database but at the start, when it
takes over what the last process knew: the watermarks, and the runs that have not ended.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pyarrow.lib as pa

from bus import topology
from bus.reader import Message
from store import tables
from store.fold import Fold, Row, restore
from store.log_fold import day_of, row_of
from store.staging import staged

log = logging.getLogger(__name__)

Batch = Mapping[str, list[Message]]
#: By stream, the last sequence applied, and when the stream was created.
Marks = Mapping[str, tuple[int, str | None]]


class Step(NamedTuple):
    """One transaction: the rows for the tables of one database, and the watermarks that go with them.

    ``place``: ``h`` for the history, or the day of a log. ``replaced``: by table, the ids whose former rows go. ``runs``: rows
    of runs, which may lack what only the former ones tell (:func:`rows_of_step`). Rows are in the types of
    :meth:`store.tables.Table.staging`.
    """

    place: str
    tables: dict[str, pa.Table]
    marks: dict[str, int]
    replaced: Mapping[str, list[str]] = MappingProxyType({})
    runs: Sequence[Row] = ()


Prepared = list[Step]
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, msgspec.MsgspecError)


class HistorySteps:
    """Folds RUNS, SESSIONS and the configuration, going on from ``marks`` and ``open_runs``.

    ``open_runs``: for each run that has not ended the columns of :data:`store.schema.LOAD_LIVE`.
    """

    def __init__(self, marks: Marks, open_runs: list[dict[str, Any]]) -> None:
        #: Per stream, the last sequence that is folded; what comes later only moves the watermark.
        self.until: Mapping[str, int] | None = None
        self._prepared = {stream: seq for stream, (seq, _) in marks.items()}
        self._fold = Fold(open_runs=restore(open_runs))
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


_TABLES = {table.name: table for table in tables.HISTORY_TABLES}
_RUN_ENDED, _SESSION_ENDED = tables.RUNS.names.index("finished_at"), tables.SESSIONS.names.index("finished_at")
_RUN_CARRIED = [(at, name) for at, name in enumerate(tables.RUNS.names) if name in tables.RUN_SPEC_COLUMNS]


def _split(noun: str, ended: int, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows for the tables of what is open and of what has ended; the latter may have fewer columns."""
    width = len(_TABLES[f"{noun}_closed"].columns)
    live = [row for row in rows if row[ended] is None]
    closed = [row[:width] for row in rows if row[ended] is not None]
    return {name: found for name, found in ((f"{noun}_live", live), (f"{noun}_closed", closed)) if found}


def rows_of_step(step: Step, former: Sequence[Mapping[str, Any]]) -> dict[str, pa.Table]:
    """The rows of a step by table, its runs among them: what only the ``former`` rows of these tell is taken over.

    ``former``: of each replaced run, the columns in :data:`store.tables.RUN_SPEC_COLUMNS` as they were staged, and its ``id``.
    """
    known = {row["id"]: row for row in former}
    runs = [_completed(row, known[row[0]]) if row[0] in known else row for row in step.runs]
    made = {name: staged(_TABLES[name], rows) for name, rows in _split("runs", _RUN_ENDED, runs).items()}
    return made | step.tables


def _completed(row: Row, former: Mapping[str, Any]) -> Row:
    made = list(row)
    for at, name in _RUN_CARRIED:
        if made[at] is None:
            made[at] = former[name]
    return tuple(made)


class LogSteps:
    """Makes rows of LOGS, day by day, going on after sequence ``applied``, which is of the day ``latest``."""

    def __init__(self, applied: int, latest: str | None) -> None:
        self.until: Mapping[str, int] | None = None
        self._prepared = applied
        self._latest = latest or ""

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


def _end(until: Mapping[str, int] | None, stream: str) -> int:
    return sys.maxsize if until is None else until.get(stream, 0)


def _row(message: Message) -> Row | None:
    try:
        return row_of(message)
    except _UNREADABLE:
        log.exception("LOGS #%s (%s) cannot be understood, passed over", message.seq, message.subject)
        return None
