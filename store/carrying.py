"""Carries a history of an older schema over into the present one, when its file is opened: no release costs a row.

What both have is copied, column by column, into a new file; what is new holds in old rows what the log would make of it, mostly
null. The former file is kept. A process killed on the way begins again, or finishes: the new file has its second name only when
it is whole.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import logging
import time
from pathlib import Path

import duckdb

log = logging.getLogger(__name__)

_COLUMNS = """
    SELECT table_name, column_name FROM duckdb_columns()
    WHERE database_name = ? AND table_name IN (SELECT table_name FROM duckdb_tables() WHERE database_name = ?)"""
_OWN = "schema_version"
#: New columns that are not null in old rows, and what they hold there.
_FILLED = {"workspaces": {"tags": "[]", "metadata": "'{}'"}}


def finish(path: Path) -> None:
    """Complete what a process did that was killed when the new file was whole."""
    whole = _whole(path)
    if whole.exists() and not path.exists():
        whole.rename(path)


def fresh_file(path: Path) -> Path:
    """Where the new file is made; what a killed process left there is removed."""
    for leftover in path.parent.glob(f"{path.name}.new*"):
        leftover.unlink()
    return path.with_name(f"{path.name}.new")


def carry(con: duckdb.DuckDBPyConnection, old: str, new: str) -> None:
    """Copy the rows of one attached database into another, which is empty and in the present schema."""
    present, former = _columns(con, new), _columns(con, old)
    con.execute("BEGIN")
    for table in (present.keys() & former.keys()) - {_OWN}:
        values = {name: f'"{name}"' for name in present[table] if name in former[table]}
        values = _FILLED.get(table, {}) | values
        names, given = ", ".join(f'"{name}"' for name in values), ", ".join(values.values())
        con.execute(f"INSERT INTO {new}.main.{table} ({names}) SELECT {given} FROM {old}.main.{table}")
    con.execute("COMMIT")
    con.execute(f"CHECKPOINT {new}")


def _columns(con: duckdb.DuckDBPyConnection, database: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table, column in con.execute(_COLUMNS, [database, database]).fetchall():
        found.setdefault(table, []).append(column)
    return found


def take_its_place(path: Path, made: Path) -> None:
    """Put the new file in the place of the old one; where that is kept."""
    whole = made.rename(_whole(path))
    kept = path.with_name(f"{path.name}.former-{time.strftime('%Y%m%dT%H%M%S')}")
    path.rename(kept)
    whole.rename(path)
    log.warning("%s was of an earlier schema, and has been carried over; the former file is %s", path, kept)


def _whole(path: Path) -> Path:
    return path.with_name(f"{path.name}.whole")
