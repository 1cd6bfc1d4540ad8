"""A second, small history store, in SQLite: it keeps the interface honest, and shows how much a store has to bring.

Not for use: there is no archive, one file holds everything, and a search reads all of the log.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import asyncio
import io
import json
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.ipc as arrow_ipc
import pyarrow.lib as pa

from helmr.chunks import LogChunk
from helmr.errors import NotFound, TimedOut, UsageError
from helmr.models import Event, LogMatch
from helmr.subjects import Scope
from store import reads, schema, tables
from store.history_store import Entity, Found, Send
from store.projector import Projector
from store.question import QueryRequest, Summary
from store.reads import NOUNS, Noun
from store.search import Wanted
from store.steps import Batch, HistorySteps, LogSteps, Prepared, Step, rows_of_step
from store.tables import Table

_TABLES = {table.name: table for table in (*tables.HISTORY_TABLES, tables.LOGS)}
_TYPES = {column.name: column.type for table in _TABLES.values() for column in table.columns}
_SPEC = ", ".join(f'"{name}"' for name in ("id", *sorted(tables.RUN_SPEC_COLUMNS)))
_MINE = "project = ? AND environment = ?"
Row = dict[str, Any]


def _written(name: str, value: Any) -> Any:
    """A staged value as SQLite keeps it: times in one form, so that they sort; lists as JSON."""
    if value is not None and _TYPES[name] == "TIMESTAMPTZ":
        return datetime.fromisoformat(value).astimezone(UTC).isoformat(timespec="microseconds")
    return json.dumps(value) if isinstance(value, list) else value


def _read(name: str, value: Any) -> Any:
    kind = _TYPES.get(name)
    if value is None:
        return None
    if kind == "VARCHAR[]":
        return json.loads(value)
    if kind == "TIMESTAMPTZ":
        return datetime.fromisoformat(value)
    return bool(value) if kind == "BOOLEAN" or name == "current" else value


def _microseconds(_unit: str, begin: str | None, end: str | None) -> int | None:
    if begin is None or end is None:
        return None
    return round((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds() * 1e6)


def _connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    uri = f"file:{path}?mode={'ro' if readonly else 'rwc'}"
    con = sqlite3.connect(uri, uri=True, check_same_thread=False, timeout=30, isolation_level=None)
    con.create_function("date_diff", 3, _microseconds, deterministic=True)
    return con


class SqliteSink:
    """Both sinks: they differ in who makes the steps."""

    def __init__(self, con: sqlite3.Connection, streams: str) -> None:
        self._con = con
        found = {
            row[0]: row[1:] for row in con.execute(schema.LOAD_MARKS.replace("arg_max(stream_created, seq)", _CREATED))
        }
        marks = {stream: mark for stream, mark in found.items() if (stream == "LOGS") == (streams == "logs")}
        self.applied = {stream: seq for stream, (seq, _) in marks.items()}
        self.created = {stream: created for stream, (_, created) in marks.items() if created}
        self.steps: HistorySteps | LogSteps = (
            LogSteps(self.applied.get("LOGS", 0), None) if streams == "logs" else HistorySteps(marks, self._open_runs())
        )

    def _open_runs(self) -> list[Row]:
        cursor = self._con.execute("SELECT * FROM runs_live")
        names = [each[0] for each in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        return [{**row, "pending_wait": row["pending_wait"] if row["status"] == "waiting" else None} for row in rows]

    def prepare(self, batch: Batch) -> Prepared:
        """Make rows."""
        return self.steps.prepare(batch)

    def store(self, prepared: Prepared) -> None:
        """Write them, each step with its watermarks."""
        for step in prepared:
            self._con.execute("BEGIN IMMEDIATE")
            with self._con:
                self._write(step)
            self.applied.update(step.marks)

    def _write(self, step: Step) -> None:
        former = [row for name, ids in step.replaced.items() for row in self._remove(name, ids)]
        for name, rows in rows_of_step(step, former).items():
            self._insert(_TABLES[name], rows.to_pylist())
        marks = [(stream, seq, "", self.created.get(stream)) for stream, seq in step.marks.items()]
        self._con.executemany("INSERT INTO projection VALUES (?, ?, ?, ?)", marks)

    def _remove(self, name: str, ids: list[str]) -> list[Row]:
        where = f"{schema.REPLACED[name]} IN ({', '.join('?' * len(ids))})"
        former: list[Row] = []
        if name == "runs_live":
            names = _SPEC.replace('"', "").split(", ")
            found = self._con.execute(f"SELECT {_SPEC} FROM runs_live WHERE {where}", ids).fetchall()
            former = [dict(zip(names, row, strict=True)) for row in found]
            former = [
                {**row, "tags": _read("tags", row["tags"]), "secrets": _read("tags", row["secrets"])} for row in former
            ]
        self._con.execute(f"DELETE FROM {name} WHERE {where}", ids)
        return former

    def _insert(self, table: Table, rows: list[Row]) -> None:
        values = [[_written(name, row[name]) for name in table.names] for row in rows]
        self._con.executemany(f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.names))})", values)


_CREATED = "max(stream_created)"


class SqliteAnswers:
    """The canned questions."""

    def __init__(self, con: sqlite3.Connection) -> None:
        self._con = con

    def _rows(self, sql: str, values: list[Any]) -> list[Row]:
        cursor = self._con.execute(sql, values)
        names = [each[0] for each in cursor.description]
        return [{name: _read(name, value) for name, value in zip(names, row, strict=True)} for row in cursor]

    async def one(self, entity: Entity, scope: Scope, entity_id: str) -> Any:
        """The record of this id."""
        noun = NOUNS[entity]
        found = self._rows(f"{noun.select} WHERE id = ? AND {_MINE}", [entity_id, *scope])
        if not found:
            raise NotFound(f"the history has no {entity} {entity_id}")
        return reads.as_record(noun, found[0])

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
        noun = NOUNS[entity]
        where, values = [_MINE], [*scope]
        for name, wanted in filters.items():
            if wanted is not None:
                given = wanted if isinstance(wanted, list) else [wanted]
                marks = ", ".join("?" * len(given))
                tagged = f"EXISTS (SELECT 1 FROM json_each(tags) WHERE value IN ({marks}))"
                where.append(tagged if name == "tags" else f"{name} IN ({marks})")
                values += given
        if since is not None:
            where.append("created_at >= ?")
            values.append(since.astimezone(UTC).isoformat(timespec="microseconds"))
        if before is not None:
            where.append(f"(created_at, id) < (SELECT created_at, id FROM {noun.view} WHERE id = ?)")
            values.append(before)
        return reads.fit(noun, self._newest(noun, " AND ".join(where), values, limit + 1), limit)

    def _newest(self, noun: Noun, where: str, values: list[Any], limit: int) -> list[Row]:
        return self._rows(f"{noun.listing} WHERE {where} ORDER BY created_at DESC, id DESC LIMIT {limit}", values)

    async def resolve(self, entity: Entity, scope: Scope, prefix: str | None, *, last: bool) -> list[str]:
        """Ids by prefix, or the last one."""
        noun = NOUNS[entity]
        if last:
            return [row["id"] for row in self._newest(noun, _MINE, [*scope], 1)]
        other = f" OR {noun.alias} = ?" if noun.alias else ""
        values = [*scope, len(prefix or ""), prefix, *([prefix] if noun.alias else [])]
        found = self._newest(noun, f"{_MINE} AND (substr(id, 1, ?) = ?{other})", values, 10)
        return [row["id"] for row in found]

    async def events(self, scope: Scope, run_id: str, *, after: int, limit: int) -> tuple[list[Event], bool]:
        """A run's events."""
        run = await self.one("run", scope, run_id)
        names = ", ".join(Event.__struct_fields__)
        sql = f"SELECT {names} FROM events WHERE run_id = ? AND cursor > ? ORDER BY seq LIMIT ?"
        found = [Event(**{**row, "data": json.loads(row["data"])}) for row in self._rows(sql, [run_id, after, limit])]
        return found, run.finished_at is not None and (found[-1].cursor if found else after) >= run.cursor

    async def chunks(
        self, scope: Scope, run_id: str, *, attempt: int | None, stream: str | None, after: int, limit: int
    ) -> tuple[list[LogChunk], bool]:
        """A run's log."""
        await self.one("run", scope, run_id)
        sql = """SELECT * FROM logs WHERE run_id = ? AND seq > ? AND attempt = coalesce(?, attempt)
                 AND stream = coalesce(?, stream) ORDER BY seq LIMIT ?"""
        found: list[LogChunk] = []
        room = reads.LOG_PAGE_BYTES
        for row in self._rows(sql, [run_id, after, attempt, stream, limit]):
            found.append(reads.chunk(row))
            room -= row["bytes"] + 200
            if room <= 0:
                return found, True
        return found, len(found) >= limit

    async def search(self, scope: Scope, wanted: Wanted, after: str | None) -> tuple[list[LogMatch], str | None]:
        """Lines of logs, 200 for each reply; context within a chunk alone."""
        flags = re.IGNORECASE if wanted.ignore_case else re.NOFLAG
        pattern = re.compile(wanted.pattern if wanted.regex else re.escape(wanted.pattern), flags)
        sql = f"""SELECT * FROM logs WHERE {_MINE} AND seq > ? AND stored_at >= ? AND run_id = coalesce(?, run_id)
                  AND stream = coalesce(?, stream)
                  AND (? IS NULL OR run_id IN (SELECT id FROM runs WHERE task_id = ?)) ORDER BY seq"""
        since = wanted.since.astimezone(UTC).isoformat(timespec="microseconds") if wanted.since else ""
        found: list[LogMatch] = []
        narrowed = [wanted.run_id, wanted.stream, wanted.task, wanted.task]
        for row in self._rows(sql, [*scope, int(after or 0), since, *narrowed]):
            found += _hits(row, pattern, wanted.context)
            if len(found) >= 200:
                return found, str(row["seq"])
        return found, None

    def close(self) -> None:
        """Nothing of its own."""


def _hits(row: Row, pattern: re.Pattern[str], context: int) -> Iterator[LogMatch]:
    lines = row["text"].removesuffix("\n").split("\n")
    head = {name: row[name] for name in ("seq", "run_id", "attempt", "stream", "at")}
    for at, line in enumerate(lines):
        if pattern.search(line):
            before, after = lines[max(at - context, 0) : at], lines[at + 1 : at + 1 + context]
            yield LogMatch(**head, line=at + 1, text=line, before=before, after=after)


class SqliteSql:
    """Users' SQL on a connection that can only read, and of that only what belongs to the scope."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def start(self) -> None:
        """Nothing to be made ready."""

    async def close(self) -> None:
        """Nothing is kept."""

    async def run(self, scope: Scope, request: QueryRequest, send: Send) -> Summary:
        """Run a query."""
        names, rows, truncated = await asyncio.to_thread(self._select, scope, request)
        if request.format == "json":
            head = {"columns": [{"name": name, "type": "VARCHAR"} for name in names]}
            await send(b"".join(json.dumps(each).encode() + b"\n" for each in (head, *rows)))
        else:
            sink = io.BytesIO()
            made = pa.Table.from_pydict({name: [row[at] for row in rows] for at, name in enumerate(names)})
            with arrow_ipc.new_stream(sink, made.schema) as stream:
                stream.write_table(made)
            await send(sink.getvalue())
        return Summary(rows=len(rows), truncated="rows" if truncated else None)

    def _select(self, scope: Scope, request: QueryRequest) -> tuple[list[str], list[Any], bool]:
        seconds, limit = request.limits()
        until = time.monotonic() + seconds
        con = _connect(self._path, readonly=True)
        try:
            for name in ("runs", "sessions", "workspaces", "deployments", "events", "logs"):
                mine = " AND ".join(f"{key} = '{value}'" for key, value in scope._asdict().items())
                con.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM main.{name} WHERE {mine}")
            con.set_authorizer(_authorize)
            con.set_progress_handler(lambda: time.monotonic() > until, 1000)
            cursor = con.execute(request.sql, request.parameters)
            rows = cursor.fetchmany(limit + 1)
            return [each[0] for each in cursor.description], rows[:limit], len(rows) > limit
        except sqlite3.Error as error:
            if "interrupted" in str(error):
                raise TimedOut(f"the query took longer than {seconds:g} s") from None
            raise UsageError(str(error)) from None
        finally:
            con.close()


def _authorize(action: int, _one: str | None, _two: str | None, base: str | None, view: str | None) -> int:
    """Only SELECT, and a table of the file only through one of the views of the scope."""
    if action in {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}:
        return sqlite3.SQLITE_OK
    reading = action == sqlite3.SQLITE_READ and (base == "temp" or view is not None)
    return sqlite3.SQLITE_OK if reading else sqlite3.SQLITE_DENY


class SqliteStore:
    """The store."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "history.sqlite"
        self._connections = [_connect(self._path) for _ in range(3)]
        con = self._connections[0]
        con.execute("PRAGMA journal_mode = WAL")
        for table in (*_TABLES.values(),):
            columns = ", ".join(f'"{name}"' for name in table.names)
            con.execute(f"CREATE TABLE IF NOT EXISTS {table.name} ({columns})")
        for name in ("runs", "sessions", "deployments"):
            con.execute(f"CREATE VIEW IF NOT EXISTS {name} AS {schema.UNIONS[name].format(h='')}")
        self.history = SqliteSink(con, "history")
        self.logs = SqliteSink(self._connections[1], "logs")

    def answers(self) -> SqliteAnswers:
        """What answers the canned questions."""
        return SqliteAnswers(self._connections[2])

    def sql(self, _projector: Projector) -> SqliteSql:
        """What runs users' SQL."""
        return SqliteSql(self._path)

    def close(self) -> None:
        """Let go of the file."""
        for con in self._connections:
            con.close()
