"""Finds lines in the logs of many runs, a bounded piece of work at a time, so that no search holds up the projector.

All matching is DuckDB's, whose regular expressions take linear time: a pattern of a user must not be able to keep the
interpreter busy. A full-text index would cost nine times what storing the logs does, and gain little (measured).
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple

import duckdb

from helmr.errors import UsageError
from helmr.models import LogMatch
from helmr.subjects import Scope
from store.reads import Cursor, Row, rows

#: Chunks looked at by one statement: some 10 MB of text, a few hundredths of a second.
_WINDOW = 5000
#: Seconds of searching for one reply.
_BUDGET = 1.0
#: Matches and bytes of one reply, at most; some more if one chunk holds many.
_MATCHES = 200
_BYTES = 400 * 1024
#: How far from a match, in the log of all runs, its neighbouring chunks are looked for.
_NEAR = 50_000
#: Lines before and after a match, at most.
MAX_CONTEXT = 50


class Wanted(NamedTuple):
    """What is looked for, and where: ``since`` is when the log stored it; ``context`` counts lines."""

    pattern: str
    regex: bool = False
    ignore_case: bool = False
    task: str | None = None
    run_id: str | None = None
    stream: str | None = None
    since: datetime | None = None
    context: int = 0


class Piece(NamedTuple):
    """What one piece of work found in a day's log; ``seq``: go on beyond it; None: the day is done."""

    matches: list[LogMatch]
    seq: int | None


def require(wanted: Wanted) -> None:
    """Refuse what cannot be searched for.

    Raises:
        UsageError: the pattern is empty or no regular expression, or too much context is asked for.
    """
    if not wanted.pattern or "\n" in wanted.pattern:
        raise UsageError("a pattern is a part of one line, and not empty")
    if not 0 <= wanted.context <= MAX_CONTEXT:
        raise UsageError(f"context is {wanted.context} lines, not 0 to {MAX_CONTEXT}")
    if wanted.regex:
        with duckdb.connect() as con:
            try:
                con.execute("SELECT regexp_matches('', ?)", [wanted.pattern])
            except duckdb.Error as error:
                hint = "the syntax is that of RE2: no look-around, no back-references"
                told = str(error).removeprefix("Invalid Input Error: ")
                raise UsageError(f"bad regular expression: {told}", hint=hint) from None


def piece(scope: Scope, wanted: Wanted, *, after: int) -> Callable[[Cursor], Piece]:
    """Search the log file a cursor is at, beyond sequence ``after``, until there is enough for a reply."""

    def read(cursor: Cursor) -> Piece:
        until = time.monotonic() + _BUDGET
        found: list[LogMatch] = []
        for first, last in _windows(cursor, after):
            found += _window(cursor, scope, wanted, first, last)
            size = sum(len(m.text) + sum(map(len, m.before + m.after)) + 200 for m in found)
            if len(found) >= _MATCHES or size >= _BYTES or time.monotonic() > until:
                return Piece(found, last)
        return Piece(found, None)

    return read


def _windows(cursor: Cursor, after: int) -> Iterator[tuple[int, int]]:
    (ends,) = rows(cursor, f"SELECT min(seq) AS first, max(seq) AS last FROM logs WHERE seq > {int(after)}", [])
    if ends["first"] is None:
        return
    for first in range(ends["first"], ends["last"] + 1, _WINDOW):
        yield first, min(first + _WINDOW - 1, ends["last"])


def _window(cursor: Cursor, scope: Scope, wanted: Wanted, first: int, last: int) -> Iterator[LogMatch]:
    filters = {name: value for name, value in wanted._asdict().items() if name in _FILTERS and value is not None}
    where = [f"seq BETWEEN {first} AND {last}", _SCOPE, *(_FILTERS[name] for name in filters), _matches("text", wanted)]
    given = {**scope._asdict(), **filters, "pattern": wanted.pattern}
    for row in rows(cursor, _lines(wanted, " AND ".join(where)), given):
        for hit in row.pop("hits"):
            yield _match(cursor, wanted, row, hit)


_SCOPE = "project = $project AND environment = $environment"
_OF_TASK = " UNION ALL ".join(
    f"SELECT id FROM h.main.{name} WHERE task_id = $task" for name in ("runs_closed", "runs_live")
)
#: What narrows a search, by its name in :class:`Wanted`.
_FILTERS = {
    "run_id": "run_id = $run_id",
    "stream": "stream = $stream",
    "since": "stored_at >= $since",
    "task": f"run_id IN ({_OF_TASK})",
}


def _matches(column: str, wanted: Wanted) -> str:
    if wanted.regex:
        flags = "mi" if wanted.ignore_case else "m"
        return f"regexp_matches({column}, '(?{flags})(?:' || $pattern || ')')"
    return f"contains(lower({column}), lower($pattern))" if wanted.ignore_case else f"contains({column}, $pattern)"


def _lines(wanted: Wanted, where: str) -> str:
    """The statement that finds the lines: chunks first, then the lines of those that match."""
    around = "'before': lines[greatest(i - {0}, 1):i - 1], 'after': lines[i + 1:i + {0}]".format(int(wanted.context))
    return f"""
        SELECT seq, run_id, attempt, dispatch_attempt, stream, "at",
          list_transform(list_filter(range(1, len(lines) + 1), lambda i: {_matches("lines[i]", wanted)}),
            lambda i: {{'line': i, 'text': lines[i], {around}}}) AS hits
        FROM (SELECT *, string_split(rtrim(text, chr(10)), chr(10)) AS lines FROM logs WHERE {where})
        ORDER BY seq"""


def _match(cursor: Cursor, wanted: Wanted, row: Row, hit: Row) -> LogMatch:
    before, after = list(hit["before"]), list(hit["after"])
    if len(before) < wanted.context:
        before = (_neighbours(cursor, row, "<", "DESC") + before)[-wanted.context :]
    if len(after) < wanted.context:
        after = (after + _neighbours(cursor, row, ">", "ASC"))[: wanted.context]
    head = {name: row[name] for name in ("seq", "run_id", "attempt", "stream", "at")}
    return LogMatch(**head, line=hit["line"], text=hit["text"], before=before, after=after)


def _neighbours(cursor: Cursor, row: Row, side: str, order: str) -> list[str]:
    """Lines of the chunks before or after one, of the same stream, in order: a chunk can be a single line."""
    same = "run_id = ? AND attempt = ? AND dispatch_attempt = ? AND stream = ?"
    near = f"seq {side} {int(row['seq'])} AND seq BETWEEN {int(row['seq']) - _NEAR} AND {int(row['seq']) + _NEAR}"
    sql = f"SELECT text FROM logs WHERE {same} AND {near} ORDER BY seq {order} LIMIT {MAX_CONTEXT}"
    found = rows(cursor, sql, [row["run_id"], row["attempt"], row["dispatch_attempt"], row["stream"]])
    texts = [each["text"] for each in found]
    return "".join(texts if order == "ASC" else reversed(texts)).removesuffix("\n").split("\n") if texts else []
