"""Opens for a query what it may read: copies of the history's files, in which one project and environment has names.

Nothing else has a name the query could use, and no other file can be opened.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import secrets
from collections.abc import Iterator

import duckdb
import msgspec

from store import schema, tables
from store.files import quoted

MEMORY = "1GB"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Whose rows are read, and from which files: ``logs`` are databases or Parquet files of a day each.

    ``history``: without one there are no tables. ``archive``: the folder of the archive.
    """

    project: str = ""
    environment: str = ""
    history: str = ""
    archive: str = ""
    logs: list[str] = []


def connection(source: Source) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB in which only the tables of one project and environment have names a query can use."""
    con = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY,
            "threads": 2,
            "temp_directory": "",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "allow_unsigned_extensions": False,
            "python_enable_replacements": False,
        },
    )
    con.execute("SET GLOBAL TimeZone = 'UTC'")
    if source.history:
        # A name nobody can guess, should the guard ever let a qualified name through.
        hidden = f"h{secrets.token_hex(8)}"
        _attach(con, source.history, hidden)
        cold = _expose(con, source, hidden)
        # Files of the archive, by their full names, are all it may still open.
        con.execute(f"SET allowed_paths = [{', '.join(map(quoted, cold))}]")
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")
    return con


def _attach(con: duckdb.DuckDBPyConnection, path: str, alias: str) -> None:
    con.execute(f"ATTACH {quoted(path)} AS {alias} (READ_ONLY)")


def _expose(con: duckdb.DuckDBPyConnection, source: Source, hidden: str) -> list[str]:
    """Name what may be read, archived or not; the files of the archive that takes."""
    prefix = f"{hidden}.main."
    mine = f"WHERE project = {quoted(source.project)} AND environment = {quoted(source.environment)}"
    events = [f"{source.archive}/{each.file}" for each in schema.archived(con, prefix)]
    bodies = {name: f"FROM {prefix}{name}" for name in schema.PLAIN}
    bodies |= {name: body.format(h=prefix) for name, body in schema.UNIONS.items()}
    bodies["events"] += f" UNION ALL {schema.cold(tables.EVENTS, events)}" if events else ""
    for name, body in bodies.items():
        con.execute(f"CREATE VIEW {name} AS SELECT * FROM ({body}) {mine}")
    cold = [path for path in source.logs if path.endswith(".parquet")]
    parts = [f"SELECT {_LOG_COLUMNS} FROM {alias}.main.logs" for alias in _attach_days(con, source, hidden)]
    parts += [schema.cold(tables.LOGS, cold)] if cold else []
    logs = " UNION ALL ".join(parts) or schema.empty(tables.LOGS)
    con.execute(f"CREATE VIEW logs AS SELECT * FROM ({logs}) {mine}")
    for name, (_, body) in schema.QUESTIONS.items():
        con.execute(f"CREATE VIEW {name} AS {body}")
    return events + cold


_LOG_COLUMNS = ", ".join(f'"{column.name}"' for column in tables.LOGS.columns)


def _attach_days(con: duckdb.DuckDBPyConnection, source: Source, hidden: str) -> Iterator[str]:
    for number, path in enumerate(path for path in source.logs if path.endswith(".db")):
        _attach(con, path, f"{hidden}_{number}")
        yield f"{hidden}_{number}"
