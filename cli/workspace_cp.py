"""``helmr workspace cp``, and ``helmr session start --upload``: local files into workspaces, and files of those out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.controls import printable
from cli.options import Command, ask
from cli.output import note, working
from helmr.errors import HelmrError, TimedOut, Unavailable, UsageError

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: What is in a workspace; a local path of this form can be written with ./ before it.
_REMOTE = re.compile(r"(@last|ws_[0-9a-z]*):(.*)", re.DOTALL)

#: Seconds; an exec whose client has left is ended at once, but its workspace may be large to look through.
_COPY_ENDS_WITHIN = 30.0


@click.command(cls=Command)
@click.argument("source")
@click.argument("target")
@click.option("--all", "everything", is_flag=True, help="Copy what .gitignore and .helmrignore name, too.")
def cp(source: str, target: str, everything: bool) -> None:
    """Copy a folder, file or link into a workspace, or out of it: one of SOURCE and TARGET is WORKSPACE:PATH.

    In a folder that is there it keeps its name; the content of a folder is FOLDER/. PATH is in the workspace's folder. Modes,
    times and links are kept, and links are not followed. What .gitignore and .helmrignore name stays here.

    \b
    Examples:
        helmr workspace cp src @last:
        helmr workspace cp . @last:project/
        helmr workspace cp @last:report.md .
    """
    inward, outward = _REMOTE.fullmatch(target), _REMOTE.fullmatch(source)
    if bool(inward) == bool(outward):
        raise UsageError(
            "one of the two must be in a workspace, and the other not", hint="helmr workspace cp src @last:src"
        )
    if "-" in {source, target}:
        raise UsageError(
            "- stands for no file here",
            hint="./- does; a file to standard output: helmr workspace files cat, or helmr workspace exec WS -- cat FILE",
        )
    with working(f"copying {source}"):
        if inward:
            workspace, path = inward.groups()
            _tell(ask(lambda client: client.workspaces.upload(workspace, source, path, ignore=not everything)))
        elif outward:
            workspace, path = outward.groups()
            _tell(ask(lambda client: client.workspaces.download(workspace, path, target)))


def uploads_of(given: tuple[str, ...]) -> list[tuple[str, str]]:
    """What is to be copied, and where to, of ``PATH[:DEST]`` s."""
    pairs = [each.partition(":") for each in given]
    for path, _, _ in pairs:
        if not path:
            raise UsageError("--upload needs a path", hint="--upload PATH or --upload PATH:DEST")
    return [(path, dest) for path, _, dest in pairs]


@asynccontextmanager
async def bring(
    client: AsyncClient, task: str, workspace: str | None, uploads: list[tuple[str, str]]
) -> AsyncIterator[str | None]:
    """Copy files into a workspace, for a start in the block: into the given one, or one made for the task.

    That one is deleted again if the copy fails or is interrupted, or the start is refused.
    """
    if not uploads:
        yield workspace
        return
    from helmr.client.copies import check_source

    for path, _ in uploads:
        check_source(Path(path))
    target = workspace or (await client.workspaces.create(task=task)).id
    copied = False
    try:
        for path, dest in uploads:
            _tell(await client.workspaces.upload(target, path, dest))
        copied = True
        yield target
    except (HelmrError, asyncio.CancelledError) as error:
        may_have_started = copied and isinstance(error, Unavailable | TimedOut | asyncio.CancelledError)
        if workspace is None and not may_have_started:
            await _take_back(client, target)
        raise


async def _take_back(client: AsyncClient, made: str) -> None:
    """Delete a workspace that was made for a start, once the copy into it has ended: while that goes on, it is refused."""
    try:
        for each in await client.workspaces.execs.list(workspace=made):
            await client.workspaces.execs.wait(each.id, timeout=_COPY_ENDS_WITHIN)
        await client.workspaces.delete(made)
    except HelmrError as error:  # what went wrong before it is to be told, too
        note(
            f"workspace {made}, made for this start, stays: {error.message}. `helmr workspace delete {made}` deletes it"
        )


def _tell(left_out: list[str]) -> None:
    for each in left_out:
        note(f"left out: {printable(each)}")
