"""Opens the DuckDB files, creates them, and gets over damage: the one place that decides what becomes of a broken file.

The recovery ladder: open; if that fails, move the write-ahead log aside and open at the last checkpoint, whose own
watermark says where to go on; if that fails too, move the database aside and begin an empty one, which the projector
fills from the log again. Nothing is ever deleted.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from helmr.errors import ConfigError, Conflict, HelmrError, Unavailable
from store import carrying, tables
from store.home import journal_of

log = logging.getLogger(__name__)

#: Megabytes of write-ahead log before a checkpoint: 1.5 times the throughput of the default 16.
_CHECKPOINT = "64MB"
_MEMORY = "2GB"
#: DuckDB's own threads, beside the one that calls. More of them cost a small batch a sixth of its processor time, for
#: waking up; and they would give one question all processors, which are for runs.
_THREADS = 1
_DISK_FULL = ("no space left", "disk quota")


def quoted(value: str | Path) -> str:
    """An SQL string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def instance(scratch: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that the files are attached to; nothing is loaded from elsewhere."""
    con = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": _MEMORY,
            "threads": _THREADS,
            "temp_directory": str(scratch),
            "checkpoint_threshold": _CHECKPOINT,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        },
    )
    con.execute("SET GLOBAL TimeZone = 'UTC'")
    return con


def attach(
    con: duckdb.DuckDBPyConnection, path: Path, alias: str, ddl: list[str], row_group: int, *, scan: bool = False
) -> None:
    """Attach the file at ``path`` for writing, going down the recovery ladder as far as necessary.

    ``scan`` reads every row, so that damage inside the file shows, too.

    Raises:
        Conflict: another process has it open.
        ConfigError: it was written by a later version of Helmr.
        Unavailable: the disk is full.
    """
    carrying.finish(path)
    journal = journal_of(path)
    for damaged in (journal, path, None):
        try:
            _open(con, path, alias, ddl, row_group, scan=scan)
        except duckdb.Error as error:
            con.execute("USE memory")
            con.execute(f"DETACH DATABASE IF EXISTS {alias}")
            _judge(error, path)
            if damaged is None:
                raise Unavailable(f"the history in {path} cannot be opened: {error}") from error
            _move_aside(damaged, error)
            if damaged == path and journal.exists():
                _move_aside(journal, error)
        else:
            return


def _judge(error: duckdb.Error, path: Path) -> None:
    """Raise for what is no damage."""
    told = str(error)
    if "Could not set lock" in told or "Unique file handle conflict" in told:
        hint = "stop the other process that has it open"
        raise Conflict(f"{path} is in use: {told}", hint=hint) from error
    if disk_full(error):
        raise Unavailable(_full(error), hint=f"make room on the disk of {path.parent}") from error
    if "permission denied" in told.lower():
        raise ConfigError(f"cannot open {path}: {told}", hint="fix its permissions") from error


def _move_aside(path: Path, error: Exception) -> None:
    if not path.exists():
        return
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 1_000_000}")
    path.rename(kept)
    log.error(
        "HISTORY DAMAGED: %s cannot be read (%s); moved to %s; what it held is read from the log again",
        path,
        str(error).partition("\n")[0],
        kept,
    )


def _open(
    con: duckdb.DuckDBPyConnection, path: Path, alias: str, ddl: list[str], row_group: int, *, scan: bool
) -> None:
    con.execute(f"ATTACH {quoted(path)} AS {alias} (ROW_GROUP_SIZE {row_group})")
    con.execute(f"USE {alias}")
    names = "SELECT table_name FROM duckdb_tables() WHERE database_name = ? AND NOT internal"
    present = [name for (name,) in con.execute(names, [alias]).fetchall()]
    if not present:
        _create(con, ddl)
    elif "schema_version" in present:
        if _version(con, path) < tables.VERSION:
            _carry_over(con, path, alias, ddl, row_group)
            return
        # Tables that the version has been given meanwhile.
        for statement in (line for line in ddl if line.startswith("CREATE TABLE ")):
            con.execute(statement.replace("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", 1))
    else:
        raise ConfigError(f"{path} is a DuckDB file, but not one of Helmr's", hint="move it away")
    if scan:
        for table in present:
            con.execute(f"SELECT count(hash(COLUMNS(*)::VARCHAR)) FROM {table}").fetchall()


def _create(con: duckdb.DuckDBPyConnection, ddl: list[str]) -> None:
    """All at once, or a process killed half-way would leave a file that is neither empty nor whole."""
    con.execute("BEGIN")
    for statement in ddl:
        con.execute(statement)
    con.execute("COMMIT")
    con.execute("CHECKPOINT")


def _version(con: duckdb.DuckDBPyConnection, path: Path) -> int:
    """The schema version of the database in use, which the present one, or an earlier one, must be."""
    row = con.execute("SELECT version FROM schema_version").fetchone()
    if row is None or row[0] > tables.VERSION:
        found = row[0] if row else "none"
        message = f"{path} has schema version {found}; this Helmr knows {tables.VERSION}"
        raise ConfigError(message, hint="it was written by a later Helmr: use that one, or move the file away")
    return int(row[0])


def _carry_over(con: duckdb.DuckDBPyConnection, path: Path, alias: str, ddl: list[str], row_group: int) -> None:
    made = carrying.fresh_file(path)
    con.execute(f"ATTACH {quoted(made)} AS {alias}_new (ROW_GROUP_SIZE {row_group})")
    con.execute(f"USE {alias}_new")
    _create(con, ddl)
    carrying.carry(con, alias, f"{alias}_new")
    con.execute(f"CHECKPOINT {alias}")
    con.execute("USE memory")
    con.execute(f"DETACH {alias}_new")
    con.execute(f"DETACH {alias}")
    carrying.take_its_place(path, made)
    con.execute(f"ATTACH {quoted(path)} AS {alias} (ROW_GROUP_SIZE {row_group})")
    con.execute(f"USE {alias}")


def disk_full(error: Exception) -> bool:
    """Whether DuckDB, or the system, failed for want of space."""
    return any(words in str(error).lower() for words in _DISK_FULL)


@contextmanager
def telling_full_disk(hint: str) -> Iterator[None]:
    """Say so when the block fails for want of space, in whichever words, and what to do.

    Raises:
        Unavailable: the disk is full.
    """
    try:
        yield
    except (duckdb.Error, OSError, Unavailable) as error:
        if not disk_full(error):
            raise
        raise Unavailable(error.message if isinstance(error, Unavailable) else _full(error), hint=hint) from error


def _full(error: Exception) -> str:
    """What DuckDB says of the file that it could not write, without its advice to those who program with it."""
    return f"the disk is full: {str(error).rpartition('Original error: ')[2]}"


def damaged(error: BaseException) -> bool:
    """Whether a failed write looks as if the file itself were damaged."""
    if isinstance(error, HelmrError):
        return False
    told = str(error).lower()
    return isinstance(error, duckdb.Error) and ("checksum" in told or "corrupt" in told)
