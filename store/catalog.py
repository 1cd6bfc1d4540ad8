"""SQL that asks the history what tables and columns it has, as any user may: for completion, and for people."""

# ruff: noqa: S608  # every name put into SQL here came out of SHOW TABLES

from __future__ import annotations

from collections.abc import Iterable

#: One column, ``name``: the tables and views a query may read.
TABLES = "SELECT name FROM (SHOW TABLES) ORDER BY name"


def columns(tables: Iterable[str]) -> str:
    """The statement whose rows are ``name, column_name, column_type``, one for each column of these tables."""
    parts = (f"SELECT '{name}' AS name, column_name, column_type FROM (DESCRIBE {name})" for name in tables)
    return " UNION ALL ".join(parts)
