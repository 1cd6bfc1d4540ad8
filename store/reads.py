"""The canned questions of the history service as SQL, and their answers as the records users see."""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec

from helmr.access import Access
from helmr.chunks import LogChunk
from helmr.durations import seconds
from helmr.errors import NotFound, UsageError
from helmr.models import Deployment, Event, Run, Session, Token, Workspace
from helmr.subjects import Scope
from store import newest, schema
from store.history_store import Found
from store.tables import EVENTS

#: Bytes of records in one reply, so that it stays below the payload limit of NATS (1 MiB by default).
PAGE_BYTES = 640 * 1024
#: Bytes of log in one reply: base64 makes them a third larger.
LOG_PAGE_BYTES = 512 * 1024
_LOG_STEP = 32
#: How much later than a run's last event its last log chunks may be stored.
_LOG_TAIL = timedelta(minutes=10)

_JSON = frozenset(
    {
        *("payload", "output", "output_artifact", "failure", "metadata", "cancel_requested", "pending_wait"),
        *("index", "data"),
    }
)
_OBJECTS = frozenset({"metadata", "index"})

Cursor = duckdb.DuckDBPyConnection
Row = dict[str, Any]


class Noun(NamedTuple):
    """A kind of record: the view and the tables it is read from, and the struct it becomes."""

    name: str
    view: str
    tables: tuple[str, ...]
    record: type[Any]
    alias: str | None = None  #: a column that names one, too
    unlisted: frozenset[str] = frozenset()  #: what is left out of lists, as it may be large

    @property
    def select(self) -> str:
        """The columns of the record."""
        return f"SELECT {', '.join(_quote(name) for name in self.record.__struct_fields__)} FROM {self.view}"

    @property
    def listing(self) -> str:
        """The columns of the record as lists have it."""
        names = (f"NULL AS {_quote(n)}" if n in self.unlisted else _quote(n) for n in self.record.__struct_fields__)
        return f"SELECT {', '.join(names)} FROM {self.view}"


NOUNS = {
    "run": Noun("run", "runs", ("runs_closed", "runs_live"), Run),
    "session": Noun("session", "sessions", ("sessions_closed", "sessions_live"), Session, "external_id"),
    "workspace": Noun("workspace", "workspaces", ("workspaces",), Workspace),
    "token": Noun("token", "tokens", ("tokens",), Token, unlisted=frozenset({"data"})),
    "access": Noun("access", "access", ("access",), Access),
    "deployment": Noun("deployment", "deployments", ("deployments_stored",), Deployment, "version"),
}

_MINE = "project = $project AND environment = $environment"


def _quote(name: str) -> str:
    return f'"{name}"'


def rows(cursor: Cursor, sql: str, parameters: list[Any] | dict[str, Any]) -> list[Row]:
    """The rows of a small result, through Arrow: a hundred times quicker than ``fetchall`` is with times and lists."""
    found: list[Row] = cursor.sql(sql, params=parameters).to_arrow_table().to_pylist()
    return found


def as_record(noun: Noun, row: Row) -> Any:
    """The record of a row; stored JSON is passed through as it is."""
    return noun.record(**{name: _value(name, value) for name, value in row.items()})


def _value(name: str, value: Any) -> Any:
    if name not in _JSON:
        return value
    if value is None:
        return {} if name in _OBJECTS else None
    return msgspec.Raw(value.encode())


def one(noun: Noun, scope: Scope, entity_id: str) -> Callable[[Cursor], Any]:
    """Read one record by its complete id."""

    def read(cursor: Cursor) -> Any:
        found = rows(cursor, f"{noun.select} WHERE id = $id AND {_MINE}", scope._asdict() | {"id": entity_id})
        if not found:
            raise NotFound(f"the history has no {noun.name} {entity_id} in {scope}")
        return as_record(noun, found[0])

    return read


def page(
    noun: Noun,
    scope: Scope,
    filters: Mapping[str, str | list[str] | None],
    *,
    since: datetime | None,
    limit: int,
    before: str | None,
) -> Callable[[Cursor], Found]:
    """Read the newest records first."""
    where = [_MINE]
    given: dict[str, Any] = scope._asdict()
    for name, value in filters.items():
        if value is not None:
            where.append(f"list_has_any(tags, ${name})" if name == "tags" else f"{name} IN (SELECT unnest(${name}))")
            given[name] = value if isinstance(value, list) else [value]
    if since is not None:
        where.append("created_at >= $since")
        given["since"] = since

    def read(cursor: Cursor) -> Found:
        conditions, values, upto = list(where), dict(given), None
        if before is not None:
            upto = _created(cursor, noun, scope, before)
            conditions.append("created_at <= $upto AND (created_at, id) < ($upto, $before)")
            values |= {"upto": upto, "before": before}
        matching = " AND ".join(conditions)
        oldest = newest.bound(cursor, noun.tables, matching, values, before=upto, count=limit + 1)
        if oldest is None:
            return Found(records=[], next=None)
        sql = f"{noun.listing} WHERE {matching} AND created_at >= $oldest ORDER BY created_at DESC, id DESC LIMIT {limit + 1}"
        return fit(noun, rows(cursor, sql, values | {"oldest": oldest}), limit)

    return read


def _created(cursor: Cursor, noun: Noun, scope: Scope, entity_id: str) -> datetime:
    sql = f"SELECT created_at FROM {noun.view} WHERE id = $id AND {_MINE}"
    found = rows(cursor, sql, scope._asdict() | {"id": entity_id})
    if not found:
        raise NotFound(f"the history has no {noun.name} {entity_id} in {scope}")
    created: datetime = found[0]["created_at"]
    return created


def fit(noun: Noun, found: list[Row], limit: int) -> Found:
    """As many records as fit into one reply, at least one; ``found``: one row more than ``limit``, if there is one."""
    fitting: list[msgspec.Raw] = []
    size = 0
    for row in found[:limit]:
        encoded = msgspec.json.encode(as_record(noun, row))
        size += len(encoded)
        if fitting and size > PAGE_BYTES:
            break
        fitting.append(msgspec.Raw(encoded))
    return Found(records=fitting, next=found[len(fitting) - 1]["id"] if len(fitting) < len(found) else None)


def point_in_time(since: str | float) -> datetime:
    """A time, given as RFC 3339 or as how long ago (``2h``, seconds).

    Raises:
        UsageError: it is neither.
    """
    if isinstance(since, str) and "T" in since:
        try:
            found = datetime.fromisoformat(since)
        except ValueError:
            hint = "write 2026-01-31T12:00:00Z, or a duration: 30m, 2h, 7d"
            raise UsageError(f"since {since!r} is neither a time nor a duration", hint=hint) from None
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.now(UTC) - timedelta(seconds=seconds(since, what="since"))


def resolve(noun: Noun, scope: Scope, prefix: str | None, *, last: bool) -> Callable[[Cursor], list[str]]:
    """Read the ids that begin with ``prefix`` (or have it as their other name), newest first, at most ten; or the last."""

    order = "ORDER BY created_at DESC, id DESC"

    def newest_one(cursor: Cursor) -> list[str]:
        oldest = newest.bound(cursor, noun.tables, _MINE, scope._asdict(), before=None, count=1)
        sql = f"SELECT id FROM {noun.view} WHERE {_MINE} AND created_at >= $oldest {order} LIMIT 1"
        return [row["id"] for row in rows(cursor, sql, scope._asdict() | {"oldest": oldest})]

    def named(cursor: Cursor) -> list[str]:
        other = f" OR {noun.alias} = $prefix" if noun.alias else ""
        sql = f"SELECT id FROM {noun.view} WHERE {_MINE} AND (starts_with(id, $prefix){other}) {order} LIMIT 10"
        return [row["id"] for row in rows(cursor, sql, scope._asdict() | {"prefix": prefix or ""})]

    return newest_one if last else named


def events(
    scope: Scope, run_id: str, archive: Path, *, after: int, limit: int
) -> Callable[[Cursor], tuple[list[Event], bool]]:
    """Read a run's events beyond cursor ``after``, archived or not, and whether the last of them ends it."""

    def read(cursor: Cursor) -> tuple[list[Event], bool]:
        run = run_bounds(cursor, scope, run_id)
        # Literals, not parameters or a join: only so does DuckDB leave out the row groups that cannot hold the run.
        bounds = f"seq BETWEEN {int(run['first_seq'])} AND {int(run['last_seq'])}"
        columns = ", ".join(_quote(name) for name in Event.__struct_fields__ if name != "data")
        source = _events_source(cursor, archive, run["first_seq"], run["last_seq"])
        sql = f"SELECT {columns}, data::JSON AS data FROM {source} WHERE {bounds} AND run_id = ? AND cursor > ? ORDER BY seq"
        found = rows(cursor, f"{sql} LIMIT {int(limit)}", [run_id, after])
        listed: list[Event] = []
        size = 0
        for row in found:
            size += len(row["data"] or "") + 300
            if listed and size > PAGE_BYTES:
                break
            listed.append(Event(**{name: _value(name, value) for name, value in row.items()}))
        seen = listed[-1].cursor if listed else after
        return listed, run["finished_at"] is not None and seen >= run["cursor"]

    return read


def _events_source(cursor: Cursor, archive: Path, first: int, last: int) -> str:
    """The table, and what of the archive overlaps with these positions."""
    paths = [
        archive / each.file for each in schema.archived(cursor) if each.first_seq <= last and first <= each.last_seq
    ]
    return f"(FROM events UNION ALL {schema.cold(EVENTS, paths)})" if paths else "events"


def run_bounds(cursor: Cursor, scope: Scope, run_id: str) -> Row:
    """Where and when the run is in the log.

    Raises:
        NotFound: there is no such run.
    """
    columns = "first_seq, last_seq, first_stored_at, last_stored_at, finished_at, cursor"
    found = rows(cursor, f"SELECT {columns} FROM runs WHERE id = $id AND {_MINE}", scope._asdict() | {"id": run_id})
    if not found:
        raise NotFound(f"the history has no run {run_id} in {scope}")
    return found[0]


def log_days(run: Row, days: list[str]) -> list[str]:
    """The days whose files may hold the run's log."""
    begin = run["first_stored_at"] - timedelta(minutes=1)
    end = (run["last_stored_at"] if run["finished_at"] else datetime.now(UTC)) + _LOG_TAIL
    first, last = begin.strftime("%Y%m%d"), end.strftime("%Y%m%d")
    # A clock set back leaves chunks in the file of a later day: the newest file may hold any.
    return [day for day in days if first <= day <= last or day == days[-1]]


def chunks(
    run_id: str, *, attempt: int | None, stream: str | None, after: int, room: int, limit: int
) -> Callable[[Cursor], list[LogChunk]]:
    """Read some ``room`` bytes of a run's chunks beyond sequence ``after`` from the log file a cursor is at."""
    where = ["run_id = ?"]
    parameters: list[Any] = [run_id]
    for name, value in (("attempt", attempt), ("stream", stream)):
        if value is not None:
            where.append(f"{name} = ?")
            parameters.append(value)
    columns = 'seq, attempt, dispatch_attempt, stream, byte_offset, "at", tombstone, text, raw, bytes'

    def read(cursor: Cursor) -> list[LogChunk]:
        listed: list[LogChunk] = []
        size, seen = 0, after
        while size < room and len(listed) < limit:
            step = min(_LOG_STEP, limit - len(listed))
            sql = f"SELECT {columns} FROM logs WHERE {' AND '.join(where)} AND seq > {int(seen)} ORDER BY seq LIMIT {step}"
            found = rows(cursor, sql, parameters)
            for row in found:
                listed.append(chunk(row))
                size += row["bytes"] + 200
                seen = row["seq"]
                if size >= room:
                    break
            if len(found) < step:
                break
        return listed

    return read


def chunk(row: Row) -> LogChunk:
    return LogChunk(
        seq=row["seq"],
        attempt=row["attempt"],
        dispatch=row["dispatch_attempt"],
        stream=row["stream"],
        offset=row["byte_offset"],
        at=row["at"],
        data=row["raw"] if row["raw"] is not None else (row["text"] or "").encode(),
        tombstone=row["tombstone"],
    )
