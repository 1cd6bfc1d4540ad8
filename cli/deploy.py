"""``helmr deploy``: from a folder to a version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.options import Command, flags
from cli.output import json_value, line, note, size

if TYPE_CHECKING:
    from helmr.models import Deployment


@click.command(cls=Command)
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--no-promote", is_flag=True, help="Do not make it the current deployment: new sessions do not use it yet."
)
def deploy(folder: Path | None, no_promote: bool) -> None:
    """Deploy the task project DIR (default: the one at or above this folder); prints its version."""
    import asyncio

    given = flags()
    root = given.settings(folder).require_root()

    async def deploying() -> Deployment:
        async with given.client(root) as client:
            return await client.deployments.deploy(root, promote=not no_promote, progress=_progress)

    made = asyncio.run(deploying())
    if given.json:
        json_value(made)
        return
    tasks = ", ".join(task["id"] for task in made.index["tasks"])
    state = "not promoted" if no_promote else "current"
    note(f"{made.project}/{made.environment}: {tasks} ({size(made.archive_bytes)}, {state})")
    line(made.version)


def _progress(text: str) -> None:
    note(text, dim=True)
