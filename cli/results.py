"""Rows of a query as a table, JSON, CSV, Parquet or Arrow, on stdout or in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from cli.controls import printable
from cli.output import aligned, note, on_terminal, table, to_json
from helmr.errors import UsageError

#: pyarrow says nothing about its types.
Table = Any

FORMATS = ["table", "json", "jsonl", "csv", "parquet", "arrow"]
#: Formats that would only confuse a terminal.
BINARY = frozenset({"parquet", "arrow"})


def default_format(output: Path | None, *, as_json: bool) -> str:
    """What is written when nothing was said about it: by the ending of the file, or by who reads."""
    if output is not None and output.suffix[1:] in FORMATS:
        return output.suffix[1:]
    if as_json:
        return "json"
    return "table" if on_terminal() and output is None else "jsonl"


def write(found: Table, form: str, output: Path | None) -> None:
    """Write the rows in a format, to a file or stdout.

    Raises:
        UsageError: the file cannot be written.
    """
    if form == "table" and output is None:
        _print_table(found)
        return
    if output is None:
        _write_to(sys.stdout.buffer, found, form)
        sys.stdout.buffer.flush()
        return
    try:
        with output.open("wb") as file:
            _write_to(file, found, form)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}", hint="choose another file with -o") from error
    note(f"{_count(found)} in {output}")


def _write_to(file: BinaryIO, found: Table, form: str) -> None:
    match form:
        case "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(found, file, compression="zstd")
        case "arrow":
            _write_arrow(file, found)
        case "csv":
            _write_csv(file, found)
        case "json":
            file.write(
                f"{to_json(list(_objects(found)), indent=file is sys.stdout.buffer and on_terminal())}\n".encode()
            )
        case "jsonl":
            file.writelines(f"{to_json(row)}\n".encode() for row in _objects(found))
        case _:
            file.write("".join(f"{each}\n" for each in aligned(found.column_names, _texts(found))).encode())


def _write_arrow(file: BinaryIO, found: Table) -> None:
    """The file format into files, where readers want to seek; the stream format into pipes, where they cannot."""
    import pyarrow.ipc as ipc  # noqa: PLR0402  # the module does not say that it exports this one

    made: Any = ipc.new_stream if file is sys.stdout.buffer else ipc.new_file
    with made(file, found.schema) as writer:
        writer.write_table(found)


def _rows(found: Table) -> Iterator[dict[str, Any]]:
    for batch in found.to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _objects(found: Table) -> Iterator[dict[str, Any]]:
    """Rows whose columns of type JSON are JSON, not text that contains it."""
    documents = {field.name for field in found.schema if (field.metadata or {}).get(b"duckdb_type") == b"JSON"}
    for row in _rows(found):
        for name in documents:
            if row[name] is not None:
                row[name] = msgspec.Raw(row[name].encode())
        yield row


def _write_csv(file: BinaryIO, found: Table) -> None:
    import csv
    import io

    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(found.column_names)
    writer.writerows([_cell(value) for value in row.values()] for row in _rows(found))
    text.detach()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else to_json(value).strip('"')


def _print_table(found: Table) -> None:
    table([printable(name) for name in found.column_names], _texts(found))
    note(_count(found), dim=True)


def _count(found: Table) -> str:
    return f"{found.num_rows} row{'' if found.num_rows == 1 else 's'}"


def _texts(found: Table) -> list[list[str]]:
    return [[_shown(value) for value in row.values()] for row in _rows(found)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "astimezone"):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    return printable(_cell(value))
