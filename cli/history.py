"""``helmr history``: hold the history against the log it was made from, make it anew, and carry it elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from cli.options import Group, flags
from cli.output import json_value, note, table, working
from helmr.errors import Unavailable

if TYPE_CHECKING:
    from helmr.config import Settings
    from store.transfer import Manifest
    from store.verify import Rebuilt, Verified

T = TypeVar("T")


@click.group(cls=Group)
def history() -> None:
    """Check the run history against the log, make it anew, and carry it elsewhere.

    These commands work on the files below the home folder, on the machine of `helmr server`.
    """


@history.command()
def verify() -> None:
    """Fold the log afresh and compare with the history, row by row. The server may run, or not.

    MISSING rows are in the log alone, EXTRA ones in the history alone: there must be none of either, or the exit code is 1.
    AGED is what the log has let go and only the history still knows.

    Example: helmr history verify --json | jq .same
    """
    found = _over_log("folding the log", _verify)
    same = found.same
    if flags().json:
        json_value({"same": same, "tables": found.tables})
    else:
        rows = [(name, t.rows, t.missing, t.extra, t.aged) for name, t in found.tables.items()]
        table(("TABLE", "ROWS", "MISSING", "EXTRA", "AGED"), [tuple(map(str, row)) for row in rows])
        note("history and log agree" if same else "history and log differ: `helmr history rebuild` makes it anew")
    if not same:
        raise click.exceptions.Exit(1)


@history.command()
@click.option("--force", is_flag=True, help="Even if runs are lost that the log has let go.")
def rebuild(*, force: bool) -> None:
    """Make the history anew from the log. The server must be stopped; the former files are kept aside.

    Refused when the history knows runs that the log has let go, unless --force.
    """

    async def make(url: str, home: Path, token: str | None) -> Rebuilt:
        from store.verify import rebuild as make_anew

        return await make_anew(url, home, token=token, force=force)

    made = _over_log("folding the log", make)
    if flags().json:
        json_value(made)
        return
    note(f"made anew: {made.runs} runs, {made.events} events")
    if made.former is not None:
        note(f"the former files are in {made.former}; delete them when you are content")


@history.command()
@click.argument("target", type=click.Path(path_type=Path))
def export(target: Path) -> None:
    """Write the whole history into TARGET: a new folder of Parquet files, or one file if its name ends in .tar.

    The server may run. Anything that reads Parquet reads the files; `helmr history import` makes a history of them again.

    Example: helmr history export backup-2026-03-01.tar
    """
    from store.transfer import export as carry_out

    with working("exporting"):
        manifest = asyncio.run(carry_out(flags().settings().home / "history", target))
    _tell(manifest, f"exported to {target}")


@history.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
def import_(source: Path) -> None:
    """Make the history from SOURCE, an export, where there is none yet. The server must be stopped.

    Beside the log it was made from, the projector goes on where the export ends. Beside another log, the history is kept,
    what that log brings is added, and runs that had not ended are cancelled: nobody will go on with them.
    """

    async def make(url: str, home: Path, token: str | None) -> tuple[Manifest, int]:
        from store.transfer import import_ as carry_in

        return await carry_in(url, home, source, token=token)

    manifest, ended = _over_log("importing", make)
    _tell(manifest, f"imported from {source}")
    if ended:
        note(f"runs that had not ended, beside another log: {ended} cancelled")


def _tell(manifest: Manifest, done: str) -> None:
    if flags().json:
        json_value(manifest)
        return
    runs = manifest.rows["runs_closed"] + manifest.rows["runs_live"]
    note(f"{done}: runs: {runs}, days with logs: {len(manifest.log_days)}")


async def _verify(url: str, home: Path, token: str | None) -> Verified:
    from store.verify import verify as compare

    return await compare(url, home, token=token)


def _over_log(what: str, use: Callable[[str, Path, str | None], Awaitable[T]]) -> T:
    """What ``use`` returns, given the URL of the log, the folder of the history and credentials."""
    settings = flags().settings()

    async def using() -> T:
        async with _log(settings) as url:
            return await use(url, settings.home / "history", settings.api_key)

    with working(what):
        return asyncio.run(using())


@asynccontextmanager
async def _log(settings: Settings) -> AsyncIterator[str]:
    """Where the log answers: the given server, the running one of this home, or its NATS started for the length of the block.

    Only an option or the variable names a server: the url of a project says where its Helmr is, not whose files these are.
    """
    if flags().url or os.environ.get("HELMR_URL"):
        yield str(settings.url)
        return
    running = _running(settings.home)
    if running is not None:
        yield running
        return
    note("no server runs here: starting its NATS for the while", dim=True)
    from bus.server import EmbeddedServer

    server = EmbeddedServer(settings.home)
    await server.start()
    try:
        yield server.url
    finally:
        await server.stop()


def _running(home: Path) -> str | None:
    from helmr import local

    try:
        return local.find(home)
    except Unavailable:
        return None
