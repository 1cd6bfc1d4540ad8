"""Finds out how old the records of a page are, so that a list costs the same however long the history is.

Rows are stored about in the order in which records are created, but not quite: a run gets its place when it ends. Yet any
rows that match give a bound: if there are as many as the page is to have, no record of the page is older than the oldest of
them. So a few rows from where the page should be are looked at, then more, and all of them only when too few match. With the
bound, DuckDB passes over the row groups whose records are older.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import duckdb

#: Rows looked at before the place where the page should begin, of each table.
_SAMPLES = (1_000, 30_000)


def bound(
    cursor: duckdb.DuckDBPyConnection,
    tables: Iterable[str],
    conditions: str,
    given: Mapping[str, Any],
    *,
    before: datetime | None,
    count: int,
) -> str | None:
    """A time that the newest ``count`` rows of ``tables`` that meet ``conditions`` are no older than; None: no row meets them.

    ``given``: the values of the conditions' parameters. ``before``: rows that meet them were created no later.
    """
    places = {table: _place(cursor, table, before) for table in tables}
    for size in _SAMPLES:
        near = {table: f"rowid >= {place - size} AND {conditions}" for table, place in places.items()}
        found, oldest = _oldest(cursor, near, given, count)
        if found == count or max(places.values()) <= size:
            return oldest
    return _oldest(cursor, dict.fromkeys(places, conditions), given, count)[1]


def _place(cursor: duckdb.DuckDBPyConnection, table: str, before: datetime | None) -> int:
    """About the number of the row that was stored when records of ``before`` were created."""
    older = "" if before is None else "WHERE created_at <= $before"
    ((place,),) = cursor.execute(
        f"SELECT count(*) FROM {table} {older}", {"before": before} if older else None
    ).fetchall()
    return int(place)


def _oldest(
    cursor: duckdb.DuckDBPyConnection, conditions: Mapping[str, str], given: Mapping[str, Any], count: int
) -> tuple[int, str | None]:
    """How many rows of the tables meet their conditions, up to ``count`` of them, the newest; and the oldest of these."""
    parts = " UNION ALL ".join(f"SELECT created_at FROM {table} WHERE {where}" for table, where in conditions.items())
    newest = f"SELECT created_at FROM ({parts}) ORDER BY created_at DESC LIMIT {count}"
    (row,) = cursor.execute(f"SELECT count(*), min(created_at)::VARCHAR FROM ({newest})", dict(given)).fetchall()
    return row[0], row[1]
