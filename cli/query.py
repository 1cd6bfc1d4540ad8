"""``helmr query``: SQL over the history, given on the command line, saved in the project, or typed into a shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cli import results, saved
from cli.options import DURATION, Choice, Command, ask, flags
from cli.output import json_value, note, on_terminal, table, working
from cli.payload import value_of
from helmr.errors import UsageError

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient


class Question(NamedTuple):
    """A statement, the values of its parameters, and how much of an answer is wanted; ``timeout`` in seconds."""

    sql: str
    parameters: dict[str, Any]
    limit: int
    timeout: float


@click.command(cls=Command)
@click.argument("sql", required=False)
@click.option(
    "--param",
    "pairs",
    metavar="NAME=VALUE",
    multiple=True,
    help="A value for $NAME, as if in quotes in its place; null and lists as JSON.",
)
@click.option(
    "--format",
    "form",
    type=Choice(results.FORMATS),
    help="Default: table on a terminal, jsonl in a pipe, json with --json.",
)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Instead of stdout."
)
@click.option("--limit", type=click.IntRange(0, 5_000_000), default=10_000, show_default=True, help="Rows at most.")
@click.option(
    "--timeout", type=DURATION, default="30s", show_default=True, metavar="D", help="Give up after this; at most 5m."
)
@click.option("--list", "listed", is_flag=True, help="List the project's saved queries.")
def query(
    sql: str | None,
    *,
    pairs: Sequence[str],
    form: str | None,
    output: Path | None,
    limit: int,
    timeout: float,
    listed: bool,
) -> None:
    """Ask the history a question in SQL: one SELECT. Without SQL, a shell opens on a terminal.

    A SQL of - is read from stdin; @NAME is the project's saved query queries/NAME.sql.

    Tables: runs, attempts, events, logs, waits, sessions, records, workspaces, versions, deployments, schedules. Views:
    run_durations, task_health, hourly_runs, failures.

    \b
    Examples:
      helmr query "select status, count(*) from runs group by all"
      helmr query @slow --param task=review -o slow.csv
    """
    if listed:
        _list_saved()
        return
    if sql is None:
        _open_shell(form, limit, timeout)
        return
    form = form or results.default_format(output, as_json=flags().json)
    if form in results.BINARY and output is None and on_terminal():
        raise UsageError(f"{form.capitalize()} is not for a terminal", hint="add -o FILE, or redirect stdout")
    with working("asking"):
        found = answer(Question(_text(sql), _parameters(pairs), limit, timeout))
    results.write(found, form, output)


def _text(sql: str) -> str:
    if sql == "-":
        return sys.stdin.read()
    return saved.find(root_of_project(), sql[1:]).sql if sql.startswith("@") else sql


def root_of_project() -> Path:
    """The task project of this folder; outside of any, the one that ``helmr dev`` runs here.

    Raises:
        ConfigError: there is neither.
    """
    from cli import dev_state

    settings = flags().settings()
    if settings.root is None and (dev := dev_state.read(settings.home)):
        return Path(dev.root)
    return settings.require_root()


def _parameters(pairs: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.removeprefix("$")
        if not equals or not name:
            raise UsageError(f"--param {pair!r} is not NAME=VALUE", hint="e.g. --param task=review --param seconds=60")
        if name in values:
            raise UsageError(f"--param {pair!r}: {name} is given twice")
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    """Text as it is: DuckDB makes of it what its place needs, as of a constant in quotes.

    A number would not do: ``version = 20260131.1`` compares as numbers, and is true of version ``20260131.10``, too.
    """
    if text == "null" or text[:1] in {"[", '"'}:
        value = value_of(text)
        return value if value is None or isinstance(value, list | str) else text
    return text


def _list_saved() -> None:
    found = saved.all_of(root_of_project())
    if flags().json:
        json_value(found)
        return
    table(["NAME", "PARAMETERS", "TITLE"], [(f"@{q.name}", " ".join(q.parameters), q.title) for q in found])


def _open_shell(form: str | None, limit: int, timeout: float) -> None:
    if not (on_terminal() and sys.stdin.isatty()):
        raise UsageError("there is no SQL", hint='give it: helmr query "select …", or - to read it from stdin')
    if form in results.BINARY:
        raise UsageError(f"{form} is not for a terminal", hint="give the SQL on the command line, and -o FILE")
    from cli.query_shell import Shell

    Shell(flags().settings().home, form or "table", limit, timeout).run()


def answer(question: Question) -> results.Table:
    """The rows, as an Arrow table; a note on stderr says when they were cut off.

    Raises:
        HelmrError: the question is refused, wrong, or takes too long.
    """
    cut: list[str] = []

    async def fetch(client: AsyncClient) -> bytes:
        stream = client.query_arrow(
            question.sql,
            question.parameters,
            limit=question.limit,
            timeout=question.timeout,
            on_truncated=cut.append,
        )
        return b"".join([part async for part in stream])

    data = ask(fetch)
    import pyarrow.ipc as ipc  # noqa: PLR0402  # the module does not say that it exports this one

    found: results.Table = ipc.open_stream(data).read_all()
    if cut:
        what = f"--limit {question.limit}" if cut[0] == "rows" else "the limit of bytes"
        note(f"only the first {found.num_rows} rows: cut off by {what}")
    return found
