"""Carries a whole history out into a folder of Parquet files, and from there into an installation that has none.

The folder is for people, too: one file per table, the events and the logs by the day, and ``manifest.json``, written last,
which says what belongs to it and how far of which log it goes. Imported into the installation of the same log (its disk was
lost, say), the projector goes on from there; into another one, the history is kept beside what that one's log will bring, and
what had not ended is ended, because nobody will go on with it.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import asyncio
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import msgspec
from nats.aio.client import Client as Nats

from bus import topology
from bus.requests import api
from helmr.connection import connected
from helmr.errors import ConfigError, Conflict, NotFound, UsageError
from store import files, parquet, schema, tables
from store.home import Home
from store.settling import settle
from store.tables import EVENTS, HISTORY_TABLES, LOGS, Table
from store.verify import copy_history, swap

_MANIFEST = "manifest.json"
#: Events, watermarks and the list of the archive's files go their own ways.
_STATES = tuple(t for t in HISTORY_TABLES if t not in {EVENTS, tables.WATERMARKS, tables.ARCHIVED})


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """How far of a log stream an export goes, and when that stream was created."""

    seq: int
    created: str | None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an export holds."""

    schema_version: int
    exported_at: datetime
    streams: dict[str, Mark]
    rows: dict[str, int]
    events: list[schema.Archived]
    log_days: list[str]


async def export(root: Path, target: Path) -> Manifest:
    """Write the history below ``root`` into ``target``: a folder, or a file that ends in ``.tar``. The projector may run.

    Raises:
        NotFound: there is no history.
        Conflict: ``target`` exists.
        Unavailable: no copy could be taken, because too much is going on, or a disk is full.
    """
    if target.exists():
        raise Conflict(f"{target} exists already", hint="name a folder or file that does not")
    if not Home(root).history.exists():
        raise NotFound(f"there is no history in {root}")
    hint = (
        f"make room on the disks of {root}, where the history is copied first, and of {target}; export to another name"
    )
    with files.telling_full_disk(hint), tempfile.TemporaryDirectory(prefix="export-", dir=root) as scratch:
        copy = await copy_history(Home(root), Path(scratch) / "copy")
        folder = Path(scratch) / "made" if target.suffix == ".tar" else target
        manifest = await asyncio.to_thread(_export, copy, folder)
        if target.suffix == ".tar":
            await asyncio.to_thread(_pack, folder, target)
    return manifest


def _pack(folder: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    with tarfile.open(part, "w") as tar:
        tar.add(folder, arcname=".")
    part.rename(target)


def _export(home: Home, folder: Path) -> Manifest:
    for part in ("tables", "events", "logs"):
        (folder / part).mkdir(parents=True)
    with duckdb.connect(":memory:") as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute(f"ATTACH {files.quoted(home.history)} AS h (READ_ONLY)")
        rows = {t.name: _write(con, t, f"h.main.{t.name}", folder / "tables" / f"{t.name}.parquet") for t in _STATES}
        events = [_link(home.archive, folder / "events", each) for each in schema.archived(con, "h.main.")]
        events += _hot_events(con, folder / "events")
        streams = _marks(con, "h")
        days = sorted({*home.days(), *home.cold_days()})
        for day in days:
            streams |= _export_logs(con, home, day, folder / "logs")
    manifest = Manifest(
        schema_version=tables.VERSION,
        exported_at=datetime.now(UTC),
        streams=streams,
        rows=rows,
        events=events,
        log_days=days,
    )
    (folder / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def _link(source: Path, target: Path, each: schema.Archived) -> schema.Archived:
    shutil.copyfile(source / each.file, target / each.file)
    return each


def _hot_events(con: duckdb.DuckDBPyConnection, folder: Path) -> Iterator[schema.Archived]:
    newest = "strftime(max(\"at\") AT TIME ZONE 'UTC', '%Y%m%d')"
    row = con.execute(f"SELECT {newest}, min(seq), max(seq) FROM h.main.events").fetchone()
    if row is None or row[1] is None:
        return
    day, first, last = row
    made = schema.Archived(day, first, last, f"events-{day}-{first}.parquet")
    _write(con, EVENTS, "h.main.events", folder / made.file)
    yield made


def _export_logs(con: duckdb.DuckDBPyConnection, home: Home, day: str, folder: Path) -> dict[str, Mark]:
    target = folder / home.cold_day(day).name
    if not home.day(day).exists():
        shutil.copyfile(home.cold_day(day), target)
        return {}
    con.execute(f"ATTACH {files.quoted(home.day(day))} AS logs_{day} (READ_ONLY)")
    _write(con, LOGS, f"logs_{day}.main.logs", target)
    return _marks(con, f"logs_{day}")


def _write(con: duckdb.DuckDBPyConnection, table: Table, source: str, path: Path) -> int:
    order = "ORDER BY seq" if "seq" in table.names else ""
    return parquet.copy(con, table.name, f"SELECT {schema.plain(table)} FROM {source} {order}", path)


def _marks(con: duckdb.DuckDBPyConnection, alias: str) -> dict[str, Mark]:
    found = con.execute(schema.LOAD_MARKS.replace("FROM projection", f"FROM {alias}.main.projection")).fetchall()
    return {stream: Mark(seq=seq, created=created) for stream, seq, created in found}


async def import_(url: str, root: Path, source: Path, *, token: str | None = None) -> tuple[Manifest, int]:
    """Make the history below ``root``, which must have none, from an export. The projector must be stopped.

    Beside another log than the export's, what had not ended is ended (:mod:`store.settling`): the second part says how many
    runs that were.

    Raises:
        NotFound: ``source`` is no export.
        ConfigError: it is of another version of Helmr, or goes with a part of this log only.
        Conflict: there is a history already, or a projector runs.
        Unavailable: NATS does not answer, or the disk is full.
    """
    home = Home(root)
    home.make()
    hint = f"make room on the disk of {root}, and import again"
    with home.lock(), files.telling_full_disk(hint), _unpacked(source, root) as folder:
        if home.history.exists():
            raise Conflict(f"there is a history in {root} already", hint="move it away first")
        manifest = _read_manifest(folder)
        async with connected(url, name="helmr-history-import", token=token) as nc:
            marks = manifest.streams if await _same_log(nc, manifest) else {}
        fresh = Home(root / "import")
        shutil.rmtree(fresh.root, ignore_errors=True)
        try:
            ended = await asyncio.to_thread(_import, folder, fresh, manifest, marks)
            swap(home, fresh)
        finally:
            shutil.rmtree(fresh.root, ignore_errors=True)
    return manifest, ended


@contextmanager
def _unpacked(source: Path, scratch: Path) -> Iterator[Path]:
    if source.is_dir():
        yield source
        return
    if not (source.is_file() and tarfile.is_tarfile(source)):
        raise NotFound(f"{source} is neither a folder nor a tar file")
    with tempfile.TemporaryDirectory(prefix="import-", dir=scratch) as folder:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder)


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, msgspec.MsgspecError) as error:
        hint = f"an export has a {_MANIFEST}; without it, it was not finished"
        raise NotFound(f"{folder} is no export of a history: {error}", hint=hint) from error
    if manifest.schema_version != tables.VERSION:
        message = f"the export is of schema version {manifest.schema_version}; this Helmr needs {tables.VERSION}"
        raise ConfigError(message, hint="import it with the Helmr that exported it")
    for name in (*(each.file for each in manifest.events), *manifest.log_days):
        if Path(name).name != name:
            raise UsageError(f"the manifest names {name!r}, which is not a file's name")
    return manifest


async def _same_log(nc: Nats, manifest: Manifest) -> bool:
    same = [await _created(nc, stream) == mark.created for stream, mark in manifest.streams.items()]
    if any(same) and not all(same):
        message = "the export goes with some streams of this log, and with others not"
        raise ConfigError(message, hint="import it into an installation of its own")
    return bool(same) and all(same)


async def _created(nc: Nats, stream: str) -> str | None:
    info = await api(nc, f"STREAM.INFO.{stream}", None)
    return str(info["created"]) if "error" not in info else ""


def _import(folder: Path, home: Home, manifest: Manifest, marks: Mapping[str, Mark]) -> int:
    home.make()
    con = files.instance(home.scratch)
    try:
        files.attach(con, home.history, "h", schema.history_ddl(), tables.HISTORY_ROW_GROUP)
        for table in _STATES:
            path = folder / "tables" / f"{table.name}.parquet"
            con.execute(f"INSERT INTO {table.name} {schema.cold(table, [path])}")
        for each in manifest.events:
            _enter_file(folder / "events" / each.file, home.archive)
            con.execute("INSERT INTO archived VALUES (?, ?, ?, ?)", list(each))
        _enter(con, {stream: mark for stream, mark in marks.items() if stream != topology.LOGS})
        for day in manifest.log_days:
            _import_logs(con, folder, home, day, marks if day == manifest.log_days[-1] else None)
        con.execute("USE h")
        ended = 0 if marks else settle(con, manifest.exported_at)
        for alias in ("h", *(f"logs_{day}" for day in home.days())):
            con.execute(f"CHECKPOINT {alias}")  # closing does so, too, but does not say when it could not
        return ended
    finally:
        con.close()


def _enter_file(source: Path, archive: Path) -> None:
    shutil.copyfile(source, archive / source.name)
    parquet.protect(archive / source.name)


def _import_logs(
    con: duckdb.DuckDBPyConnection, folder: Path, home: Home, day: str, marks: Mapping[str, Mark] | None
) -> None:
    """The last day becomes a database, to which the projector may add; it has the watermark of the logs."""
    path = folder / "logs" / home.cold_day(day).name
    if marks is None:
        _enter_file(path, home.archive)
        return
    files.attach(con, home.day(day), f"logs_{day}", schema.logs_ddl(), tables.LOGS_ROW_GROUP)
    con.execute(f"INSERT INTO logs {schema.cold(LOGS, [path])}")
    _enter(con, {stream: mark for stream, mark in marks.items() if stream == topology.LOGS})


def _enter(con: duckdb.DuckDBPyConnection, marks: Mapping[str, Mark]) -> None:
    for stream, mark in marks.items():
        con.execute("INSERT INTO projection VALUES (?, ?, now(), ?)", [stream, mark.seq, mark.created])
