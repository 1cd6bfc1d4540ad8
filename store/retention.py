"""Deletes from the archive what has been kept long enough, each project and environment for as long as it wants.

A file of the archive holds a day of all projects: once nobody wants a row of it any more it is deleted, before that it is
written anew without the rows that have had their time. What goes is noted in the table ``forgotten`` first, so that a
comparison with the log can tell it from what is missing.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import duckdb
import msgspec

from helmr.index import RetentionEntry
from helmr.subjects import Scope
from store import files, parquet

log = logging.getLogger(__name__)

Kind = Literal["events", "logs"]
Cursor = duckdb.DuckDBPyConnection

_CHOSEN = """
    SELECT d.project, d.environment, d.index->'$.retention'
    FROM h.main.deployments_stored d JOIN h.main.deployments_current c
      ON c.project = d.project AND c.environment = d.environment AND c.deployment_id = d.id"""


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How many days are kept where, the present one not counted; None: for good.

    ``hot``: days whose events and logs stay in the database files. ``logs`` and ``events``: days after which they are deleted,
    of projects that do not say otherwise.
    """

    hot: int = 7
    logs: int | None = 30
    events: int | None = None


class Rules(NamedTuple):
    """What applies at a point in time: the installation's retention, and what the current deployments say."""

    now: datetime
    retention: Retention
    chosen: dict[Scope, RetentionEntry]

    def closed(self, kind: Kind) -> str:
        """Days before this one belong in the archive: rows are deleted from there alone."""
        every = [self.retention.hot, *(self._days(kind, scope) for scope in (None, *self.chosen))]
        return day(self.now, min(each for each in every if each is not None))

    def oldest(self, kind: Kind, scope: Scope) -> str:
        """The first day that is kept of this scope; "" for all."""
        days = self._days(kind, scope)
        return "" if days is None else day(self.now, days)

    def _days(self, kind: Kind, scope: Scope | None) -> int | None:
        own = None
        if scope in self.chosen:
            own = self.chosen[scope].keep_logs if kind == "logs" else self.chosen[scope].keep_events
        if own == "forever":
            return None
        return own if own is not None else (self.retention.logs if kind == "logs" else self.retention.events)


def rules(cursor: Cursor, retention: Retention, now: datetime) -> Rules:
    """What applies now."""
    chosen = {}
    for project, environment, told in cursor.execute(_CHOSEN).fetchall():
        try:
            chosen[Scope(project, environment)] = msgspec.json.decode(told or "{}", type=RetentionEntry)
        except msgspec.ValidationError as error:
            log.warning("the retention of %s.%s cannot be understood, passed over: %s", project, environment, error)
    return Rules(now, retention, chosen)


def day(now: datetime, ago: int) -> str:
    """The day ``YYYYMMDD`` so many days ago."""
    return (now - timedelta(days=ago)).strftime("%Y%m%d")


class Outdated(NamedTuple):
    """A file of the archive with rows that are to go, and the scopes whose rows stay."""

    kind: Kind
    path: Path
    going: dict[Scope, str]  #: and the first day that is kept of each
    staying: frozenset[Scope]


class Scopes:
    """Whose rows are in which file of the archive; a file is looked into once."""

    def __init__(self) -> None:
        self._known: dict[Path, frozenset[Scope]] = {}

    def outdated(self, cursor: Cursor, kind: Kind, days: Iterable[tuple[str, Path]], rules: Rules) -> list[Outdated]:
        """The files that have rows of before the first day kept of whom they belong to."""
        found = []
        for of, path in days:
            scopes = self._of(cursor, path)
            going = {scope: rules.oldest(kind, scope) for scope in scopes if of < rules.oldest(kind, scope)}
            if going:
                found.append(Outdated(kind, path, going, scopes - going.keys()))
        return found

    def _of(self, cursor: Cursor, path: Path) -> frozenset[Scope]:
        if path not in self._known:
            sql = f"SELECT DISTINCT project, environment FROM read_parquet({files.quoted(path)})"
            self._known[path] = frozenset(Scope(*row) for row in cursor.execute(sql).fetchall())
        return self._known[path]

    def drop(self, each: Outdated) -> None:
        """Forget what was known of a file that has changed."""
        self._known.pop(each.path, None)


def note(cursor: Cursor, outdated: Iterable[Outdated]) -> None:
    """Enter what will go; the cursor is at the history, in a transaction."""
    for kind, scope, oldest in sorted({(each.kind, s, of) for each in outdated for s, of in each.going.items()}):
        key = [*scope, kind]
        cursor.execute("DELETE FROM forgotten WHERE project = ? AND environment = ? AND kind = ?", key)
        before = datetime.strptime(oldest, "%Y%m%d").replace(tzinfo=UTC)
        cursor.execute("INSERT INTO forgotten VALUES (?, ?, ?, ?)", [*key, before])


def rewrite(cursor: Cursor, each: Outdated) -> None:
    """Write the file anew with what stays."""
    staying = ", ".join(f"({files.quoted(scope.project)}, {files.quoted(scope.environment)})" for scope in each.staying)
    source = f"SELECT * FROM read_parquet({files.quoted(each.path)}) WHERE (project, environment) IN ({staying})"
    parquet.write(cursor, each.kind, source, each.path)
