"""Holds the history against the log: ``verify`` folds the log afresh and compares, ``rebuild`` puts the result in place.

The log is the truth and the history a projection of it, so the two must be identical, row by row, for all that the log
still has. What the log has let go (runs ended long ago, old log chunks) only the history knows: it is counted as aged
by ``verify``, and ``rebuild`` refuses to lose it unless forced.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import duckdb
import msgspec

from bus import topology
from helmr.connection import connected
from helmr.errors import Conflict, NotFound, Unavailable
from store import files, schema, tables
from store.home import Home, journal_of
from store.projector import HISTORY_STREAMS, Projector
from store.sinks import Store
from store.tables import Table

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

log = logging.getLogger(__name__)

#: Seconds a fold of the whole log may take.
_PATIENCE = 24 * 3600.0
_COPY_TRIES = 50

#: What is compared: the columns, where they are read from, and which rows are aged: those of an entity (column, and view
#: that has it) the log no longer has, and those before the first row of the fresh fold.
_COMPARED: tuple[tuple[str, Table, tuple[str, str] | None], ...] = (
    ("runs", tables.RUNS, ("id", "runs")),
    ("attempts", tables.ATTEMPTS, ("run_id", "runs")),
    ("waits", tables.WAITS, ("run_id", "runs")),
    ("events", tables.EVENTS, ("run_id", "runs")),
    ("sessions", tables.SESSIONS, ("id", "sessions")),
    ("workspaces", tables.WORKSPACES, ("id", "workspaces")),
    ("versions", tables.VERSIONS, ("workspace_id", "workspaces")),
    ("tokens", tables.TOKENS, ("id", "tokens")),
    ("access", tables.ACCESS, ("id", "access")),
    ("records", tables.RECORDS, ("session_id", "sessions")),
    ("deployments", tables.DEPLOYMENTS, ("id", "deployments")),
    ("unreadable", tables.UNREADABLE, None),
)


#: What the history deletes by age, and the time that goes by.
_DATED = {"events": '"at"', "logs": "stored_at"}
_FORGOTTEN = """
    (SELECT max(f.before) FROM a.main.forgotten f
     WHERE f.kind = '{0}' AND f.project = t.project AND f.environment = t.environment)"""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How a table compares: rows of the fresh fold that the history lacks, rows it has too many, rows the log let go."""

    rows: int
    missing: int
    extra: int
    aged: int


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison, table by table."""

    tables: dict[str, Difference]

    @property
    def same(self) -> bool:
        """Whether history and log agree."""
        return not any(table.missing or table.extra for table in self.tables.values())


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebuild made, and where the former files are."""

    runs: int
    events: int
    former: str | None


async def fold_log(url: str, home: Home, *, token: str | None = None, until: Mapping[str, int] | None = None) -> None:
    """Fold the log as it is now into the (new) files of ``home``; ``until``: leave out what comes after, per stream."""
    store = Store(home)
    try:
        store.history.steps.until = store.logs.steps.until = until
        async with connected(url, name="helmr-history-rebuild", token=token) as nc:
            projector = Projector(nc, store)
            await projector.check()
            async with projector.running():
                await projector.fresh(logs=True, timeout=_PATIENCE)
        await asyncio.to_thread(store.checkpoint)
    finally:
        store.close()


async def verify(url: str, root: Path, *, token: str | None = None) -> Verified:
    """Compare the history below ``root`` with the log; the projector may go on running.

    Raises:
        NotFound: there is no history.
        Unavailable: NATS does not answer, no copy could be taken, or the disk is full.
    """
    home = Home(root)
    if not home.history.exists():
        raise NotFound(f"there is no history in {root}")
    hint = f"make room on the disk of {root}: for the while, a comparison takes about twice what the history does"
    with files.telling_full_disk(hint), tempfile.TemporaryDirectory(prefix="verify-", dir=root) as folder:
        copy = await copy_history(home, Path(folder) / "copy")
        fresh = Home(Path(folder) / "fresh")
        until = await asyncio.to_thread(watermarks, copy)
        await fold_log(url, fresh, token=token, until=until)
        return await asyncio.to_thread(compare, copy, fresh)


async def copy_history(home: Home, target: Path) -> Home:
    """A copy of all files, taken while the projector may go on.

    Raises:
        Unavailable: a file kept changing.
    """
    copy = Home(target)
    copy.logs.mkdir(parents=True)
    # Logs first, history second: neither may have applied more than the log will be asked for.
    for day in home.days():
        await _copy_unless_archived(home, copy, day)
    await copy_at_rest(home.history, copy.history)
    # The archive last: what has been moved there meanwhile is in both, and read from one.
    copy.archive.mkdir()
    for path in home.archive.glob("*.parquet"):
        os.link(path, copy.archive / path.name)
    return copy


async def _copy_unless_archived(home: Home, copy: Home, day: str) -> None:
    try:
        await copy_at_rest(home.day(day), copy.day(day))
    except FileNotFoundError:
        if not home.cold_day(day).exists():
            raise


async def rebuild(url: str, root: Path, *, token: str | None = None, force: bool = False) -> Rebuilt:
    """Make the files below ``root`` anew from the log; the projector must be stopped. The former files are kept aside.

    Raises:
        Conflict: a projector runs; or the history knows runs that the log has let go, and ``force`` is not given.
        Unavailable: NATS does not answer, or the disk is full; the history is as it was.
    """
    home = Home(root)
    home.make()
    hint = f"make room on the disk of {root}, for a second history, and rebuild again; the present one is as it was"
    with home.lock(), files.telling_full_disk(hint), ExitStack() as cleanup:
        fresh = Home(root / "rebuild")
        shutil.rmtree(fresh.root, ignore_errors=True)
        cleanup.callback(shutil.rmtree, fresh.root, ignore_errors=True)
        await fold_log(url, fresh, token=token)
        former, made = await asyncio.to_thread(_counts, home), await asyncio.to_thread(_counts, fresh)
        if made is None:
            raise Unavailable("the rebuilt history cannot be read")
        if former is not None and former[0] > made[0] and not force:
            message = f"the history has {former[0]} runs, the log only {made[0]}: the others would be lost"
            raise Conflict(message, hint="to give them up, rebuild with --force; the former files are kept either way")
        kept = swap(home, fresh)
        return Rebuilt(runs=made[0], events=made[1], former=str(kept) if kept else None)


def swap(home: Home, fresh: Home) -> Path | None:
    """Put the files of ``fresh`` in place of those of ``home``, which go into a folder; that folder, if there were any."""
    kept = home.root / f"former-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 1_000_000}"
    moved = False
    for name in (home.history.name, journal_of(home.history).name, home.logs.name, home.archive.name):
        if (home.root / name).exists():
            kept.mkdir(exist_ok=True)
            (home.root / name).rename(kept / name)
            moved = True
    for name in (home.history.name, home.logs.name, home.archive.name):
        (fresh.root / name).rename(home.root / name)
    return kept if moved else None


def _counts(home: Home) -> tuple[int, int] | None:
    """Runs and events of a history; None where there is none that can be read."""
    if not home.history.exists():
        return None
    try:
        with duckdb.connect(str(home.history), read_only=True) as con:
            row = con.execute("SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM events)").fetchone()
    except duckdb.Error as error:
        log.warning("%s cannot be read: %s", home.history, error)
        return None
    return (row[0], row[1]) if row else None


async def copy_at_rest(source: Path, target: Path) -> None:
    """Copy a database that another process may be writing, without asking it.

    Between two checkpoints only the write-ahead log grows, and any beginning of it is a state the database was in. So a
    copy is good if the file itself did not change meanwhile.

    Raises:
        Unavailable: it changed every time.
    """
    journal, copied = journal_of(source), journal_of(target)
    for _ in range(_COPY_TRIES):
        before = _state(source)
        await asyncio.to_thread(shutil.copyfile, source, target)
        copied.unlink(missing_ok=True)
        if journal.exists():
            await asyncio.to_thread(_copy_if_there, journal, copied)
        if _state(source) == before:
            return
        await asyncio.sleep(0.1)  # a checkpoint was under way: there is no event to wait for from outside
    raise Unavailable(f"{source} keeps changing", hint="stop the projector, or try when less is going on")


def _copy_if_there(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:  # a checkpoint took it: the comparison of states finds out
        log.debug("%s is gone", source)


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def watermarks(home: Home) -> dict[str, int]:
    """How far of each stream a history that nobody is writing goes."""
    found = {topology.LOGS: 0}
    for path in [home.history, *map(home.day, home.days())]:
        with duckdb.connect(str(path), read_only=True) as con:
            for stream, seq in con.execute("SELECT stream, seq FROM projection").fetchall():
                found[stream] = max(seq, found.get(stream, 0))
    return {stream: found.get(stream, 0) for stream in (*HISTORY_STREAMS, topology.LOGS)}


def compare(history: Home, fresh: Home) -> Verified:
    """Compare two histories that nobody is writing, table by table."""
    with duckdb.connect(":memory:") as con:
        con.execute("SET TimeZone = 'UTC'")
        for alias, home in (("a", history), ("b", fresh)):
            con.execute(f"ATTACH {files.quoted(home.history)} AS {alias} (READ_ONLY)")
            _views(con, alias, home)
        found = {name: _difference(con, name, table, aged) for name, table, aged in _COMPARED}
        found["logs"] = _difference(con, "logs", tables.LOGS, ("run_id", "runs"))
    return Verified(tables=found)


def _views(con: duckdb.DuckDBPyConnection, alias: str, home: Home) -> None:
    hot = home.days()
    days = []
    for day in hot:
        con.execute(f"ATTACH {files.quoted(home.day(day))} AS {alias}_{day} (READ_ONLY)")
        days.append(f"FROM {alias}_{day}.main.logs")
    archived = [home.cold_day(day) for day in home.cold_days() if day not in hot]
    days += [schema.cold(tables.LOGS, archived)] if archived else []
    bodies = {name: body.format(h=f"{alias}.main.") for name, body in schema.UNIONS.items()}
    bodies |= {name: f"FROM {alias}.main.{name}" for name, _, _ in _COMPARED if name not in bodies}
    events = [home.archive / each.file for each in schema.archived(con, f"{alias}.main.")]
    bodies["events"] += f" UNION ALL {schema.cold(tables.EVENTS, events)}" if events else ""
    bodies["logs"] = " UNION ALL ".join(days) or schema.empty(tables.LOGS)
    for name, body in bodies.items():
        con.execute(f"CREATE VIEW {alias}_{name} AS {body}")


def _difference(con: duckdb.DuckDBPyConnection, name: str, table: Table, entity: tuple[str, str] | None) -> Difference:
    columns = ", ".join(
        f'"{c.name}"::JSON::VARCHAR' if c.type == "VARIANT" else f'"{c.name}"::VARCHAR' for c in table.columns
    )
    # Chunks and records go by age, too, while their run or session is still there.
    aged = f"seq < (SELECT coalesce(min(seq), {2**62}) FROM b_{name})" if "seq" in table.names else "false"
    if entity is not None:
        aged += f" OR {entity[0]} NOT IN (SELECT id FROM b_{entity[1]})"
    if name in _DATED:
        aged += f" OR coalesce({_DATED[name]} < {_FORGOTTEN.format(name)}, false)"
    a = f"(SELECT {columns} FROM a_{name} t WHERE NOT ({aged}))"
    b = f"(SELECT {columns} FROM b_{name} t WHERE NOT ({aged}))"
    return Difference(
        rows=_count(con, f"FROM b_{name}"),
        missing=_count(con, f"FROM ({b} EXCEPT ALL {a})"),
        extra=_count(con, f"FROM ({a} EXCEPT ALL {b})"),
        aged=_count(con, f"FROM a_{name} t WHERE {aged}"),
    )


def _count(con: duckdb.DuckDBPyConnection, source: str) -> int:
    row = con.execute(f"SELECT count(*) {source}").fetchone()
    return int(row[0]) if row else 0
