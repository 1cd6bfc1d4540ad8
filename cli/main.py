"""The command ``helmr``: finds the module of a subcommand when it is used, so that the others cost no start-up time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from cli.errors import report
from cli.options import Flags, Group
from helmr.version import __version__

#: Each command: where it is (``module:attribute``) and what ``helmr --help`` says about it, in the order of that page.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("cli.init:init", "Write a task project that runs as it stands."),
    "dev": ("cli.dev:dev", "Run everything on this machine, and deploy on every change."),
    "server": ("cli.server:server", "Run NATS (unless given a URL), control and the projector."),
    "worker": ("cli.worker:worker", "Run a worker: execute runs in containers."),
    "status": ("cli.status:status", "Say which parts are up and making progress."),
    "doctor": ("cli.doctor:doctor", "Check this machine, with a fix for whatever is wrong."),
    "deploy": ("cli.deploy:deploy", "Deploy a task project; prints the version."),
    "deployment": ("cli.deployment:deployment", "List, show and promote deployments."),
    "task": ("cli.task:task", "List and show the tasks of the current deployment."),
    "sandbox": ("cli.sandbox:sandbox", "List and show the sandboxes of the current deployment."),
    "session": ("cli.session:session", "Start, list, show, close and cancel sessions; their streams."),
    "run": ("cli.run:run", "List, show, follow, wait for and cancel runs."),
    "queue": ("cli.queue:queue", "List and show queues: limits, slots, who waits."),
    "token": ("cli.token:token", "Create, show, list, complete and cancel tokens."),
    "access": ("cli.access:access", "Let somebody use one stream or token over HTTP; list that, revoke it."),
    "logs": ("cli.logs:logs", "Search the logs of all runs."),
    "workspace": ("cli.workspace:workspace", "Make, list and stop workspaces; copy files, run programs in them."),
    "secret": ("cli.secret:secret", "Store secrets for tasks; values are never printed."),
    "query": ("cli.query:query", "Ask the history a question in SQL."),
    "stats": ("cli.stats:stats", "Answer the usual questions: success, durations, failures, what is slow."),
    "top": ("cli.top:top", "Watch queues, workers and runs as they change."),
    "history": ("cli.history:history", "Check the history against the log, make it anew, carry it elsewhere."),
    "completion": ("cli.completion:completion", "Print a completion script for your shell."),
}

_COMPLETE = "_HELMR_COMPLETE"


class Commands(Group):
    """The root: knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of this name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="helmr", message="%(prog)s %(version)s")
def helmr() -> None:
    """A self-hosted runtime for coding agents and other long, interruptible work.

    Wherever an id is asked for, a unique beginning of it or @last will do.
    """


def call(args: Sequence[str]) -> int:
    """Run a command line and return its exit code; every error ends here."""
    flags = Flags()
    try:
        with helmr.make_context("helmr", list(args), obj=flags) as ctx:
            helmr.invoke(ctx)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001  # the last stop of whatever went wrong, KeyboardInterrupt included
        return report(error, debug=flags.debug)
    return 0


def main() -> NoReturn:
    """The entry point of the program ``helmr``."""
    if instruction := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(helmr, {}, "helmr", _COMPLETE, instruction))
    sys.exit(call(sys.argv[1:]))


if __name__ == "__main__":
    main()
