"""``helmr init``: a task project that runs as it stands."""

from __future__ import annotations

from pathlib import Path

import click

from cli.options import Command, flags
from cli.output import json_value, line, note


@click.command(cls=Command)
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", metavar="NAME", help="Of the project; default: made from the folder's name.")
def init(folder: Path, name: str | None) -> None:
    """Write a task project into DIR (default: this folder); prints the files it wrote."""
    from helmr.scaffold import write_project

    written = write_project(folder, name or flags().project)
    if flags().json:
        json_value([str(path) for path in written])
        return
    for path in written:
        line(str(path))
    where = "" if folder == Path() else f" {folder}"
    note(f"next: helmr dev{where}   and in another terminal: helmr session start hello --payload name=Ada --follow")
