"""``helmr workspace pty``: terminals in workspaces that are there whether anybody looks at them or not."""

from __future__ import annotations

from typing import Any

import click

from cli import terminal_session
from cli.options import DURATION, Command, Group, ask, flags
from cli.output import json_value, line, note
from cli.references import PTY, WORKSPACE
from cli.workspace_exec import SHELL, attach_to, environment, show_all
from helmr.errors import UsageError
from helmr.models import Exec

#: Rows and columns of a terminal that nobody has looked at yet.
_SIZE = (24, 80)
_LENGTH = click.IntRange(1, 1000)


@click.group(cls=Group)
def pty() -> None:
    """Terminals in a workspace: make one, connect to it, leave it, come back, close it.

    A terminal is an exec that has one: `helmr workspace exec get|logs|wait|kill` take its id, too. `helmr workspace shell`
    makes one and connects to it at once.

    \b
    Examples:
        PTY=$(helmr workspace pty create @last)
        helmr workspace pty connect $PTY
    """


@pty.command(cls=Command)
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--rows", type=_LENGTH, default=_SIZE[0], show_default=True, help="Its height, until somebody connects.")
@click.option(
    "--columns", type=_LENGTH, default=_SIZE[1], show_default=True, help="Its width, until somebody connects."
)
@click.option("--cwd", metavar="DIR", help="The folder to begin in, from that of the workspace on; default: that one.")
@click.option("--env", "pairs", multiple=True, metavar="KEY=VALUE", help="A variable of its environment.")
@click.option("--idempotency-key", metavar="KEY", help="The same terminal with the same key is made only once.")
def create(
    workspace_id: str,
    command: tuple[str, ...],
    *,
    rows: int,
    columns: int,
    cwd: str | None,
    pairs: tuple[str, ...],
    idempotency_key: str | None,
) -> None:
    """Make a terminal with a shell in it, or a program of your choice, and print its id; nobody is connected to it.

    \b
    Examples:
        helmr workspace pty create @last -- top
    """
    variables = {"TERM": "xterm-256color"} | terminal_session.environment() | environment(pairs)
    given: dict[str, Any] = {"cwd": cwd, "env": variables, "idempotency_key": idempotency_key}
    made = ask(
        lambda client: client.workspaces.execs.start(workspace_id, command or SHELL, terminal=(rows, columns), **given)
    )
    _say(made, None)


@pty.command("list")
@click.option("--workspace", metavar="WORKSPACE", type=WORKSPACE, help="Of this workspace only.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
def list_(workspace: str | None, limit: int) -> None:
    """List terminals, newest first; those that ended more than 7 days ago are gone."""
    found = ask(lambda client: client.workspaces.execs.list(workspace=workspace, limit=1000))
    show_all([each for each in found if each.terminal][:limit])


@pty.command()
@click.argument("pty_id", metavar="PTY", type=PTY)
def connect(pty_id: str) -> None:
    """Be at a terminal: first what it showed, as far as it is kept, then what it shows. Who was connected is no longer.

    At the beginning of a line, ~. ends it, ~d leaves it running, ~? explains.
    """
    if not ask(lambda client: client.workspaces.execs.get(pty_id)).terminal:
        raise UsageError(f"{pty_id} has no terminal", hint=f"go back to it with `helmr workspace exec attach {pty_id}`")
    attach_to(pty_id, with_input=True)


@pty.command()
@click.argument("pty_id", metavar="PTY", type=PTY)
@click.option("--rows", type=_LENGTH, required=True, help="Its height.")
@click.option("--columns", type=_LENGTH, required=True, help="Its width.")
def resize(pty_id: str, rows: int, columns: int) -> None:
    """Give a terminal another size, until whoever is connected resizes theirs.

    \b
    Examples:
        helmr workspace pty resize pty_01 --rows 50 --columns 132
    """
    resized = ask(lambda client: client.workspaces.execs.resize(pty_id, rows, columns))
    _say(resized, f"{resized.id} is told to be {rows} by {columns}")


@pty.command()
@click.argument("pty_id", metavar="PTY", type=PTY)
@click.option("--grace", type=DURATION, default="2s", show_default=True, metavar="D", help="From SIGTERM to SIGKILL.")
def close(pty_id: str, grace: float) -> None:
    """End a terminal, with everything that was started in it."""
    closed = ask(lambda client: client.workspaces.execs.kill(pty_id, grace=grace))
    _say(closed, f"{closed.id} has ended already" if closed.ended else f"{closed.id} is being closed")


def _say(record: Exec, text: str | None) -> None:
    """The record for programs; for people a note, or else the id."""
    if flags().json:
        json_value(record)
    elif text is None:
        line(record.id)
    else:
        note(text)
