"""``helmr query``: SQL over the history, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
import msgspec

from cli.options import DURATION, Choice, Command, ask, flags
from cli.output import aligned, note, on_terminal, table, to_json, working
from helmr.errors import UsageError

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: pyarrow says nothing about its types.
Table = Any

FORMATS = ["table", "json", "jsonl", "csv", "parquet"]


@click.command(cls=Command)
@click.argument("sql")
@click.option(
    "--format", "form", type=Choice(FORMATS), help="Default: table on a terminal, jsonl in a pipe, json with --json."
)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Instead of stdout."
)
@click.option("--limit", type=click.IntRange(0, 5_000_000), default=10_000, show_default=True, help="Rows at most.")
@click.option(
    "--timeout", type=DURATION, default="30s", show_default=True, metavar="D", help="Give up after this; at most 5m."
)
def query(sql: str, form: str | None, output: Path | None, limit: int, timeout: float) -> None:
    """Ask the history a question in SQL: one SELECT. A SQL of - is read from stdin.

    Tables: runs, attempts, events, logs, waits, sessions, records, workspaces, versions, deployments, schedules. Views:
    run_durations, task_health, hourly_runs, failures.
    """
    sql = sys.stdin.read() if sql == "-" else sql
    form = form or _default_format(output)
    if form == "parquet" and output is None and on_terminal():
        raise UsageError("Parquet is not for a terminal", hint="add -o FILE, or redirect stdout")
    cut: list[str] = []

    async def fetch(client: AsyncClient) -> bytes:
        stream = client.query_arrow(sql, limit=limit, timeout=timeout, on_truncated=cut.append)
        return b"".join([part async for part in stream])

    with working("asking"):
        data = ask(fetch)
    import pyarrow.ipc as ipc  # noqa: PLR0402  # the module does not say that it exports this one

    found: Table = ipc.open_stream(data).read_all()
    _write(found, form, output)
    if cut:
        what = f"--limit {limit}" if cut[0] == "rows" else "the limit of bytes"
        note(f"only the first {found.num_rows} rows: cut off by {what}")


def _default_format(output: Path | None) -> str:
    if output is not None and output.suffix[1:] in FORMATS:
        return output.suffix[1:]
    if flags().json:
        return "json"
    return "table" if on_terminal() and output is None else "jsonl"


def _write(found: Table, form: str, output: Path | None) -> None:
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
    note(f"{found.num_rows} rows in {output}")


def _write_to(file: BinaryIO, found: Table, form: str) -> None:
    match form:
        case "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(found, file, compression="zstd")
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
    table(found.column_names, _texts(found))
    note(f"{found.num_rows} row{'' if found.num_rows == 1 else 's'}", dim=True)


def _texts(found: Table) -> list[list[str]]:
    return [[_shown(value) for value in row.values()] for row in _rows(found)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if hasattr(value, "astimezone"):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    return _cell(value)
