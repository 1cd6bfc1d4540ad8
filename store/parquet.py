"""Writes the files of the archive: whole and on the disk, or not at all."""

# every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import duckdb

from store import files

#: A run's log or events are a few row groups; with larger ones a lookup would read ten times as much.
_ROW_GROUP = {"events": 10240, "logs": 2048}


def write(cursor: duckdb.DuckDBPyConnection, kind: Literal["events", "logs"], select: str, path: Path) -> None:
    """Write rows into a file, in the order of the log, under another name first; it takes the place of a former one."""
    part = path.with_name(path.name + ".part")
    options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROW_GROUP[kind]}"
    cursor.execute(f"COPY (FROM ({select}) ORDER BY seq) TO {files.quoted(part)} ({options})")
    protect(part)
    sync(part)
    part.rename(path)
    sync(path.parent)


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
