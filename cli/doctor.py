"""``helmr doctor``: is this machine fit for Helmr, and what to do if it is not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import click

from cli import checks
from cli.checks import Finding
from cli.errors import colour
from cli.options import Command, Flags, flags
from cli.output import STATUS_COLOURS, json_value, line
from helmr.errors import HelmrError, Unavailable


@click.command(cls=Command)
def doctor() -> None:
    """Check this machine, with a fix for whatever is wrong; the exit code is 1 when a check fails."""
    given = flags()
    found = asyncio.run(_examine(given))
    if given.json:
        json_value(found)
    if any(each.state == "failed" for each in found):
        raise click.exceptions.Exit(1)


async def _examine(given: Flags) -> list[Finding]:
    found = []
    async for finding in _checks(given):
        found.append(finding)
        if not given.json:
            _say(finding)
    return found


async def _checks(given: Flags) -> AsyncIterator[Finding]:
    """Every check; none of them keeps the next one from being made."""
    home = given.settings().home
    async for finding in checks.machine(home):
        yield finding
    async with AsyncExitStack() as stack:
        client = None
        try:
            client = await stack.enter_async_context(given.client(anywhere=True))
        except Unavailable as error:
            # Nobody has to run a server; but one that was named has to answer.
            state = "failed" if given.settings().url else "warning"
            yield Finding(check="server", state=state, detail=error.message, fix=error.hint)  # type: ignore[arg-type]
        except HelmrError as error:
            yield Finding(check="server", state="failed", detail=error.message, fix=error.hint)
        if client is not None:
            async for finding in checks.server(client):
                yield finding
        async for finding in checks.engine(home, client):
            yield finding


def _say(finding: Finding) -> None:
    state = finding.state.ljust(7)
    shown = click.style(state, fg=STATUS_COLOURS.get(finding.state, "red")) if colour(sys.stdout) else state
    line(f"{shown}  {finding.check}: {finding.detail}")
    if finding.fix:
        line(f"         fix: {finding.fix}")
