"""What commands print: tables on a terminal, aligned text off it, JSON on request; notes on stderr, data on stdout."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

import click
import msgspec

from cli.controls import Tamer, tame
from cli.errors import colour
from cli.options import flags
from helmr.durations import format_seconds

#: The colour of each status, on a terminal.
STATUS_COLOURS = {
    "queued": "yellow",
    "running": "cyan",
    "waiting": "magenta",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "bright_black",
    "expired": "bright_black",
    "open": "green",
    "live": "green",
    "up": "green",
    "down": "red",
    "ok": "green",
    "warning": "yellow",
}

#: Characters that the last column of a table gets at least.
_LAST_COLUMN = 16

Row = Sequence[object]


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def note(text: str, *, dim: bool = False) -> None:
    """One line for people, on stderr."""
    text = tame(text) if sys.stderr.isatty() else text
    click.echo(click.style(text, dim=True) if dim else text, err=True, color=colour(sys.stderr))


def line(text: str) -> None:
    """One line of data, on stdout, at once."""
    click.echo(tame(text) if on_terminal() else text)


class Streams:
    """Writes streams of bytes, ``stderr`` to stderr and others to stdout; on a terminal, without what would command it."""

    def __init__(self) -> None:
        self._tamers: defaultdict[str, Tamer] = defaultdict(Tamer)

    def write(self, stream: str, data: bytes) -> None:
        """Write what can be said of the stream so far, at once."""
        out = _out(stream)
        out.buffer.write(self._tamers[stream].take(data) if out.isatty() else data)
        out.buffer.flush()

    def end(self) -> None:
        """Write what is left: nothing follows that would decide whether it is harmless."""
        for stream, tamer in self._tamers.items():
            out = _out(stream)
            out.buffer.write(tamer.end())
            out.buffer.flush()


def _out(stream: str) -> TextIO:
    return sys.stderr if stream == "stderr" else sys.stdout


def to_json(value: Any, *, indent: bool = False) -> str:
    """Compact or indented JSON."""
    data = msgspec.json.encode(value)
    return (msgspec.json.format(data, indent=2) if indent else data).decode()


def json_value(value: Any) -> None:
    """One JSON value on stdout: indented for a person, on one line for a program."""
    line(to_json(value, indent=on_terminal()))


def json_line(value: Any) -> None:
    """One line of a JSON stream."""
    line(to_json(value))


def table(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Rows under their column names."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if on_terminal():
        _rich_table(columns, [[tame(text) for text in row] for row in texts])
        return
    for each in aligned(columns, texts):
        line(each)


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table as plain text."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns, 1):
        shown.add_column(name, no_wrap=number < len(columns), overflow="fold")
    for row in rows:
        shown.add_row(*(Text(text, style=STATUS_COLOURS.get(text, "")) for text in row))
    # Only the last column may be folded: ids and numbers stay in one piece, however narrow the terminal is.
    needed = sum(max(map(len, column)) + 2 for column in list(zip(columns, *rows, strict=True))[:-1])
    console = Console()
    console.width = max(console.width, needed + _LAST_COLUMN)
    console.print(shown)


def record(fields: Mapping[str, object]) -> None:
    """One thing, a line for each of its fields; those that are None are left out."""
    shown = {name: value for name, value in fields.items() if value is not None}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        text = (tame(str(value)) if on_terminal() else str(value)).replace("\n", "\n" + " " * (width + 2))
        paint = {"fg": STATUS_COLOURS.get(text)} if text in STATUS_COLOURS else {}
        label = click.style(name.ljust(width), bold=True)
        click.echo(f"{label}  {click.style(text, **paint)}", color=colour(sys.stdout))  # type: ignore[arg-type]


def show(value: object, fields: Mapping[str, object]) -> None:
    """One thing: all of it as JSON, if that is asked for; else the ``fields`` that people look at."""
    if flags().json:
        json_value(value)
    else:
        record(fields)


def compact(value: Any) -> str | None:
    """JSON values in a field: nothing for what is empty."""
    return None if value in (None, {}, [], ()) else to_json(value)


def age(at: datetime | None) -> str:
    """How long ago, for tables: ``3m 12s ago``."""
    if at is None:
        return ""
    return f"{format_seconds(max((datetime.now(UTC) - at).total_seconds(), 0.0))} ago"


def moment(at: datetime | None) -> str | None:
    """A time for people who read a record: local time, and how long ago it was, or how soon it will be."""
    if at is None:
        return None
    ahead = (at - datetime.now(UTC)).total_seconds()
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S} ({f'in {format_seconds(ahead)}' if ahead > 0 else age(at)})"


def clock(at: datetime) -> str:
    """The local time of day, for log lines."""
    return f"{at.astimezone():%H:%M:%S}"


def span(start: datetime | None, end: datetime | None) -> str:
    """How long something took, or has taken until now."""
    if start is None:
        return ""
    return format_seconds(max(((end or datetime.now(UTC)) - start).total_seconds(), 0.0))


def size(count: float) -> str:
    """Bytes for people: ``1.4 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner while a block works, where a person sees stderr."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
