"""``helmr logs``: look for lines in the logs of many runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.options import DURATION, Choice, Group, ask, flags, interrupted
from cli.output import json_line, line, note, on_terminal
from cli.references import RUN
from helmr.durations import format_seconds

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient
    from helmr.models import LogMatch


@click.group(cls=Group)
def logs() -> None:
    """Search the logs of runs; `helmr run logs` prints those of one."""


@logs.command()
@click.argument("pattern")
@click.option("--since", type=DURATION, default="24h", show_default=True, metavar="D", help="How far back to look.")
@click.option("--task", metavar="TASK", help="Only runs of this task.")
@click.option("--run", "run_id", metavar="RUN", type=RUN, help="Only this run.")
@click.option("--stream", type=Choice(["stdout", "stderr", "log"]), help="Only this stream.")
@click.option("-C", "--context", type=click.IntRange(0, 50), default=0, metavar="N", help="Lines around each match.")
@click.option("--regex", is_flag=True, help="PATTERN is a regular expression, in the syntax of RE2.")
@click.option("-i", "--ignore-case", is_flag=True, help="Take a for A.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop after this many matches.")
def search(pattern: str, *, run_id: str | None, limit: int | None, **wanted: Any) -> None:
    """Print the lines that contain PATTERN, oldest first, as they are found. Exit code 1 when there are none.

    A match across two chunks of output (some 16 KiB each, or what came within a moment) is not found.

    Examples:

    \b
      helmr logs search "connection refused" --since 7d
      helmr logs search --regex "timeout after [0-9]+ s" --task review-pr -C 3
      helmr logs search ERROR --run @last --json | jq -r .text
    """
    printer = _Printer(as_json=flags().json)

    async def look(client: AsyncClient) -> None:
        resolved = await client.resolve("run", run_id) if run_id is not None else None
        found = client.runs.search(pattern, run=resolved, **wanted)
        async for match in found:
            printer.take(match)
            if printer.count == limit:
                return

    with interrupted(None):
        ask(look)
    if not printer.count:
        note(_nothing(wanted))
        raise click.exceptions.Exit(1)


def _nothing(wanted: dict[str, Any]) -> str:
    """That there is nothing, and what was left out."""
    more = "" if wanted["ignore_case"] else "; -i takes a for A"
    return f"nothing found in the last {format_seconds(wanted['since'])}{more}; look further back with --since"


class _Printer:
    """Prints matches: a line that names the run whenever another one speaks, then what it said."""

    def __init__(self, *, as_json: bool) -> None:
        self.count = 0
        self._as_json = as_json
        self._last: tuple[str, int, str] | None = None

    def take(self, match: LogMatch) -> None:
        """Print one match."""
        self.count += 1
        if self._as_json:
            json_line(match)
            return
        place = (match.run_id, match.attempt, match.stream)
        if place != self._last:
            told = f"{match.run_id} attempt {match.attempt} {match.stream} {match.at:%Y-%m-%dT%H:%M:%SZ}"
            line(click.style(told, bold=True) if on_terminal() else told)
        elif match.before or match.after:
            line("  --")
        self._last = place
        for text in match.before:
            line(f"  - {text}")
        line(f"  : {match.text}")
        for text in match.after:
            line(f"  - {text}")
