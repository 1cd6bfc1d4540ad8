"""``helmr workspace exec`` and ``helmr workspace shell``: programs in workspaces, beside runs."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from cli import exec_session, terminal_session
from cli.controls import printable
from cli.options import DURATION, Choice, Command, Group, ask, flags
from cli.output import Streams, age, json_line, json_value, line, moment, note, show, table
from cli.references import EXEC, WORKSPACE
from helmr.errors import UsageError
from helmr.models import Exec

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: What a shell is, if nothing else was asked for: the best there is, with the environment of the image.
SHELL = ("/bin/sh", "-c", "if command -v bash >/dev/null; then exec bash; fi; exec sh")
_RUN = "run"


class ExecGroup(Group):
    """A noun that is a verb as well: what is none of its commands is the workspace to execute in."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Have ``exec WS -- COMMAND`` mean ``exec run WS -- COMMAND``."""
        first = next((word for word in args if not word.startswith("-")), None)
        helping = any(name in args for name in ctx.help_option_names) and first is None
        if args and first not in self.commands and not helping:
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


class RunCommand(Command):
    """A command with another one in it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say what is missing when an option of the other command is taken for one of this."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if "--" not in args and not error.possibilities:
                error.hint = "put -- before the command: helmr workspace exec WORKSPACE -- COMMAND"  # type: ignore[attr-defined]
            raise


@click.group("exec", cls=ExecGroup)
def exec_() -> None:
    """Run a program in a workspace: helmr workspace exec WS -- COMMAND. See what runs, what it wrote; end it.

    \b
    Examples:
        helmr workspace exec @last -- ls -l
        tar c . | helmr workspace exec @last -- tar x
        helmr workspace exec @last --detach -- make test
    """


@exec_.command(_RUN, cls=RunCommand)
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--detach", is_flag=True, help="Have it go on by itself; prints its id.")
@click.option("--cwd", metavar="DIR", help="The folder to run in, from that of the workspace on; default: that one.")
@click.option("--env", "pairs", multiple=True, metavar="KEY=VALUE", help="A variable of its environment.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal: for editors, top, and the like.")
@click.option("--no-stdin", "-n", is_flag=True, help="Leave standard input alone: its own is empty.")
@click.option("--idempotency-key", metavar="KEY", help="The same command with the same key is started only once.")
def run(
    *,
    workspace_id: str,
    command: tuple[str, ...],
    detach: bool,
    cwd: str | None,
    pairs: tuple[str, ...],
    tty: bool,
    no_stdin: bool,
    idempotency_key: str | None,
) -> None:
    """Run a program in a workspace, beside its runs; `run` may be left out.

    Input, output, signals and the exit code are passed through. It ends with this command, unless --detach. The workspace
    comes to life if it is not; if files have changed, there is a new version of it at the end.

    \b
    Examples:
        helmr workspace exec @last -- ls -l
        tar c . | helmr workspace exec @last -- tar x
        helmr workspace exec @last -- tar c out | tar x
    """
    if detach and tty:
        raise UsageError("--detach and --tty exclude each other", hint="leave a terminal with ~d")
    given: dict[str, Any] = {"cwd": cwd, "env": environment(pairs), "idempotency_key": idempotency_key}
    if detach:
        started = ask(lambda client: client.workspaces.execs.start(workspace_id, command, **given))
        json_value(started) if flags().json else line(started.id)
        return
    if tty:
        _terminal(workspace_id, command, **given | {"env": terminal_session.environment() | given["env"]})
        return

    async def execute(client: AsyncClient) -> int:
        opened = await client.workspaces.execs.open(workspace_id, command, input=not no_stdin, **given)
        async with opened as process:
            return await exec_session.converse(process, with_input=not no_stdin)

    click.get_current_context().exit(ask(execute))


@click.command(cls=Command)
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--cwd", metavar="DIR", help="The folder to begin in, from that of the workspace on; default: that one.")
@click.option("--env", "pairs", multiple=True, metavar="KEY=VALUE", help="A variable of its environment.")
def shell(workspace_id: str, command: tuple[str, ...], cwd: str | None, pairs: tuple[str, ...]) -> None:
    """Open a terminal in a workspace; its shell, or a program of your choice.

    At the beginning of a line, ~. ends it, ~d leaves it running (helmr workspace exec attach goes back to it), ~? explains.

    \b
    Examples:
        helmr workspace shell @last
        helmr workspace shell @last -- top
    """
    variables = terminal_session.environment() | environment(pairs)
    _terminal(workspace_id, command or SHELL, cwd=cwd, env=variables)


@exec_.command()
@click.argument("exec_id", metavar="EXEC", type=EXEC)
@click.option("--no-stdin", "-n", is_flag=True, help="Leave standard input alone.")
def attach(exec_id: str, no_stdin: bool) -> None:
    """Go back to an exec or a terminal: first what it wrote, as far as it is kept, then what it writes.

    Ending this command ends the exec, unless it is a terminal that is left with ~d.
    """
    attach_to(exec_id, with_input=not no_stdin)


def attach_to(exec_id: str, *, with_input: bool) -> None:
    """Go back to an exec; ends with its exit code."""

    async def go_on(client: AsyncClient) -> int:
        async with await client.workspaces.execs.attach(exec_id) as process:
            if not process.record.terminal:
                return await exec_session.converse(process, with_input=with_input)
            await process.resize(*terminal_session.size())
            return await terminal_session.converse(process)

    _conclude(go_on)


@exec_.command("list")
@click.option("--workspace", metavar="WORKSPACE", type=WORKSPACE, help="Of this workspace only.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most.")
def list_(workspace: str | None, limit: int) -> None:
    """List execs and terminals, newest first; those that ended more than 7 days ago are gone."""
    show_all(ask(lambda client: client.workspaces.execs.list(workspace=workspace, limit=limit)))


def show_all(found: list[Exec]) -> None:
    """Execs as a table, or as JSON."""
    if flags().json:
        json_value(found)
        return
    rows = [
        (
            each.id,
            each.workspace_id,
            each.status,
            _code(each),
            age(each.created_at),
            printable(shlex.join(each.argv))[:60],
        )
        for each in found
    ]
    table(("EXEC", "WORKSPACE", "STATE", "CODE", "STARTED", "COMMAND"), rows)


@exec_.command()
@click.argument("exec_id", metavar="EXEC", type=EXEC)
def get(exec_id: str) -> None:
    """Show an exec."""
    _show(ask(lambda client: client.workspaces.execs.get(exec_id)))


@exec_.command()
@click.argument("exec_id", metavar="EXEC", type=EXEC)
@click.option("--follow", "-f", is_flag=True, help="Go on until it has ended.")
@click.option("--stream", type=Choice(["stdout", "stderr"]), help="Only this one.")
@click.option("--offset", type=click.IntRange(0), metavar="BYTES", help="Begin at this byte of the stream.")
def logs(exec_id: str, follow: bool, stream: str | None, offset: int | None) -> None:
    """Print what an exec wrote: the latest 64 MiB of it, for 7 days; stdout to stdout, stderr to stderr.

    \b
    Examples:
        helmr workspace exec logs @last --stream stdout --offset 1000000
    """

    async def copy(client: AsyncClient) -> None:
        expected: dict[str, int] = {}
        streams = Streams()
        found = client.workspaces.execs.output(exec_id, stream=stream, offset=offset, follow=follow)
        async for chunk in found:
            if flags().json:
                json_line(chunk)
                continue
            if chunk.offset > expected.get(chunk.stream, offset or 0):
                note(f"-- {chunk.stream} before byte {chunk.offset} is not kept any more --")
            expected[chunk.stream] = chunk.offset + len(chunk.data)
            streams.write(chunk.stream, chunk.data)
        streams.end()

    ask(copy)


@exec_.command()
@click.argument("exec_id", metavar="EXEC", type=EXEC)
@click.option("--timeout", type=DURATION, metavar="D", help="Wait no longer than this; the exec goes on.")
def wait(exec_id: str, timeout: float | None) -> None:
    """Wait until an exec has ended; its exit code becomes that of this command."""
    ended = ask(lambda client: client.workspaces.execs.wait(exec_id, timeout=timeout))
    from helmr.client.execs import exit_code_of

    if flags().json:
        json_value(ended)
    click.get_current_context().exit(exit_code_of(ended))


@exec_.command()
@click.argument("exec_id", metavar="EXEC", type=EXEC)
@click.option("--signal", "name", metavar="NAME", help="Send only this, and only to the main process, e.g. HUP.")
@click.option("--grace", type=DURATION, default="2s", show_default=True, metavar="D", help="From SIGTERM to SIGKILL.")
def kill(exec_id: str, name: str | None, grace: float) -> None:
    """End an exec with all processes that came of it; or send it a signal."""
    number = None if name is None else _signal(name)
    killed = ask(lambda client: client.workspaces.execs.kill(exec_id, signal=number, grace=grace))
    if flags().json:
        json_value(killed)
    else:
        note(f"{killed.id} has ended already" if killed.ended else f"{killed.id} was told")


def _terminal(workspace_id: str, command: tuple[str, ...], **given: Any) -> None:
    async def open_(client: AsyncClient) -> int:
        size = terminal_session.size()
        async with await client.workspaces.execs.open(workspace_id, command, terminal=size, **given) as process:
            return await terminal_session.converse(process)

    _conclude(open_)


def _conclude(use: Callable[[AsyncClient], Awaitable[int]]) -> None:
    """Run a session, and end with its exit code; or say how to go back to it."""
    try:
        code = ask(use)
    except terminal_session.Left as left:
        note(f"\nit goes on: helmr workspace exec attach {left.exec_id}")
        return
    except terminal_session.Ended as ended:
        raise KeyboardInterrupt from ended
    click.get_current_context().exit(code)


def environment(pairs: tuple[str, ...]) -> dict[str, str]:
    """Variables as they are given.

    Raises:
        UsageError: one has no name or no value.
    """
    for pair in pairs:
        if "=" not in pair[1:]:
            raise UsageError(f"--env {pair}: a name, = and a value are needed", hint="e.g. --env COLOUR=blue")
    return dict(pair.split("=", 1) for pair in pairs)


def _signal(name: str) -> int:
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    if name.isdigit() and int(name) in set(signal.Signals):
        return int(name)
    if full not in signal.Signals.__members__:
        raise UsageError(f"there is no signal {name}", hint="e.g. TERM, HUP, INT, USR1 or KILL")
    return int(signal.Signals[full])


def _code(each: Exec) -> str | None:
    return None if each.exit_code is None else str(each.exit_code)


def _show(shown: Exec) -> None:
    show(
        shown,
        {
            "id": shown.id,
            "state": shown.status,
            "workspace": shown.workspace_id,
            "command": shlex.join(shown.argv),
            "in": shown.cwd,
            "terminal": "yes" if shown.terminal else None,
            "worker": shown.worker,
            "exit code": _code(shown),
            "reason": shown.reason,
            "started": moment(shown.started_at),
            "ended": moment(shown.finished_at),
        },
    )
