"""``helmr workspace files``: ls, cat and stat, of versions; no container is started."""

from __future__ import annotations

import functools
import stat as modes
from typing import TYPE_CHECKING

import click

from cli.options import Group, ask, flags
from cli.output import Streams, json_value, moment, show, size, table
from cli.references import WORKSPACE
from helmr.models import FileEntry

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

_TYPES = {"file": modes.S_IFREG, "folder": modes.S_IFDIR, "link": modes.S_IFLNK}

version_option = functools.partial(
    click.option, "--version", metavar="VERSION", help="Its id, a unique beginning, or number; default: the latest."
)


@click.group(cls=Group)
def files() -> None:
    """Look at the files of a workspace as they are in a version; starts no container."""


@files.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("path", default="")
@version_option()
@click.option("--recursive", "-r", is_flag=True, help="Also what is in folders in it.")
def ls(workspace_id: str, path: str, version: str | None, recursive: bool) -> None:
    """List a folder; default: the whole workspace's own."""
    found = ask(lambda client: client.workspaces.files(workspace_id, path, version=version, recursive=recursive))
    if flags().json:
        json_value(found)
        return
    rows = [(_mode(each), size(each.size), moment(each.modified_at), _name(each)) for each in found]
    table(("MODE", "SIZE", "CHANGED", "PATH"), rows)


@files.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("path")
@version_option()
def cat(workspace_id: str, path: str, version: str | None) -> None:
    """Write a file to standard output, byte by byte as it is; on a terminal, without what would command it."""

    async def copy(client: AsyncClient) -> None:
        streams = Streams()
        async for data in client.workspaces.read(workspace_id, path, version=version):
            streams.write("stdout", data)
        streams.end()

    ask(copy)


@files.command()
@click.argument("workspace_id", metavar="WORKSPACE", type=WORKSPACE)
@click.argument("path")
@version_option()
def stat(workspace_id: str, path: str, version: str | None) -> None:
    """Show what is known about a file, folder or link."""
    shown = ask(lambda client: client.workspaces.stat(workspace_id, path, version=version))
    show(
        shown,
        {
            "path": shown.path,
            "kind": shown.kind,
            "mode": _mode(shown),
            "size": str(shown.size),
            "changed": moment(shown.modified_at),
            "target": shown.target,
        },
    )


def _mode(entry: FileEntry) -> str:
    return modes.filemode(_TYPES[entry.kind] | (0o777 if entry.kind == "link" else entry.mode))


def _name(entry: FileEntry) -> str:
    if entry.kind == "link":
        return f"{entry.path} -> {entry.target}"
    return f"{entry.path}/" if entry.kind == "folder" else entry.path
