"""Writes the files of the archive: whole and on the disk, or not at all."""

# every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import duckdb

from store import files

#: A run's log or events are a few row groups; with larger ones a lookup would read ten times as much.
_ROW_GROUP = {"events": "ROW_GROUP_SIZE 10240", "logs": "ROW_GROUP_SIZE 2048"}


def write(cursor: duckdb.DuckDBPyConnection, kind: Literal["events", "logs"], select: str, path: Path) -> None:
    """Write rows into a file, in the order of the log, under another name first; it takes the place of a former one."""
    part = path.with_name(path.name + ".part")
    copy(cursor, kind, f"FROM ({select}) ORDER BY seq", part)
    protect(part)
    sync(part)
    part.rename(path)
    sync(path.parent)


def copy(cursor: duckdb.DuckDBPyConnection, table: str, select: str, path: Path) -> int:
    """Write rows of a table into a file, as many at a time as suit the table; how many rows that were."""
    options = ", ".join(["FORMAT parquet", "COMPRESSION zstd", *filter(None, [_ROW_GROUP.get(table)])])
    ((count,),) = cursor.execute(f"COPY ({select}) TO {files.quoted(path)} ({options})").fetchall()
    return int(count)


def protect(path: Path) -> None:
    """Write-protect a file of the archive: it never changes, and users' SQL reads it where it is."""
    path.chmod(0o444)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
