"""Hands rows to DuckDB with statements prepared once: at small batches, planning costs more than the rows themselves.

A table of rows travels as Arrow. What DuckDB scans is a :class:`Cell`, registered once per table under a name of its own
and filled anew for each batch, so that nothing changes for it between one batch and the next: an insert of eight runs
takes 1.2 ms of processor time, against 5 ms (and 0.6 ms for a name) when each batch registers and plans anew.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow.lib as pa

from store.fold import Row
from store.schema import FORGET_MARKS
from store.tables import WATERMARKS, Table, cast

#: Watermarks between two deletions of former ones.
_TIDY = 500
_IDS = pa.schema([("id", pa.string())])


def staged(table: Table, rows: Sequence[Row]) -> pa.Table:
    """The rows as an Arrow table in the table's staging types."""
    types = table.staging()
    columns = [pa.array(values, type=kind.type) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]
    return pa.Table.from_arrays(columns, schema=types)


class Cell:
    """A name in DuckDB whose rows are exchanged from batch to batch."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = schema.empty_table()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """What DuckDB calls for each scan."""
        return self.rows.__arrow_c_stream__(requested_schema)

    def __arrow_c_schema__(self) -> object:
        """What DuckDB calls when it plans."""
        return self.rows.schema.__arrow_c_schema__()


class Writer:
    """The prepared inserts and deletions of one cursor over one database, which the cursor must be at (``USE``).

    ``keys``: the tables whose rows are replaced, and the expression that names such a row. ``returning``: expressions that
    :meth:`remove` gives back of the rows it deletes.
    """

    def __init__(
        self,
        cursor: duckdb.DuckDBPyConnection,
        tables: Iterable[Table],
        keys: Mapping[str, str],
        returning: Mapping[str, str],
    ) -> None:
        self.cursor = cursor
        self._cells: dict[str, Cell] = {}
        self._returning = frozenset(returning)
        self._marks = 0
        for table in (*tables, WATERMARKS):
            columns = ", ".join(cast(column) for column in table.columns)
            self._prepare(
                f"insert_{table.name}", table.staging(), f"INSERT INTO {table.name} SELECT {columns} FROM {{}}"
            )
        for name, key in keys.items():
            given = f" RETURNING {returning[name]}" if name in returning else ""
            self._prepare(f"delete_{name}", _IDS, f"DELETE FROM {name} WHERE {key} IN (SELECT id FROM {{}}){given}")

    def _prepare(self, name: str, schema: pa.Schema, statement: str) -> None:
        cell = self._cells[name] = Cell(schema)
        self.cursor.register(f"cell_{name}", cell)
        self.cursor.execute(f"PREPARE {name} AS {statement.format(f'cell_{name}')}")

    def insert(self, name: str, rows: pa.Table) -> None:
        """Append rows to a table."""
        self._execute(f"insert_{name}", rows)

    def remove(self, name: str, ids: list[str]) -> list[dict[str, Any]]:
        """Delete the rows of these ids from a table; what ``returning`` says of them."""
        done = self._execute(f"delete_{name}", pa.Table.from_arrays([pa.array(ids, pa.string())], schema=_IDS))
        if name not in self._returning:
            return []
        names = [column[0] for column in done.description or ()]
        return [dict(zip(names, row, strict=True)) for row in done.fetchall()]

    def mark(self, marks: Mapping[str, int], created: Mapping[str, str], at: str) -> None:
        """Note watermarks; the largest of a stream counts. Those before it are deleted now and then.

        Never by UPDATE, which blocks checkpoints while anybody reads; and a deletion each time costs more than the insert.
        """
        rows = [(stream, seq, at, created.get(stream)) for stream, seq in marks.items()]
        self.insert(WATERMARKS.name, staged(WATERMARKS, rows))
        self._marks += 1
        if self._marks % _TIDY == 1:
            self.cursor.execute(FORGET_MARKS)

    def _execute(self, name: str, rows: pa.Table) -> duckdb.DuckDBPyConnection:
        cell = self._cells[name]
        cell.rows = rows
        try:
            return self.cursor.execute(f"EXECUTE {name}")
        finally:
            cell.rows = rows.schema.empty_table()

    def close(self) -> None:
        """Forget the statements: the database they are about is about to be detached."""
        for name in self._cells:
            self.cursor.execute(f"DEALLOCATE {name}")
            self.cursor.unregister(f"cell_{name}")
        self._cells.clear()
