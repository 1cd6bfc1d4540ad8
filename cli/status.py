"""``helmr status``: is each part up, and does it make progress."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli import dev_state
from cli.options import DURATION, Command, Flags, flags
from cli.output import json_value, note, size, table
from helmr.durations import format_seconds
from helmr.errors import HelmrError, NotAllowed, TimedOut, Unavailable

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient
    from helmr.config import Settings

#: Seconds between looks while waiting: nothing tells when a part that does not exist yet begins to.
_LOOK = 0.15
PARTS = ("nats", "control", "projector", "workers", "dev")


class Part(msgspec.Struct, kw_only=True):
    """One part: whether it is up, in a few words and in facts."""

    up: bool
    detail: str
    facts: dict[str, Any] = {}


class Status(msgspec.Struct, kw_only=True):
    """All parts; ``ready`` when every one is up."""

    url: str | None
    ready: bool
    project: str | None
    environment: str
    parts: dict[str, Part]


@click.command(cls=Command)
@click.option("--wait", type=DURATION, metavar="D", help="Until every part is up and what `dev` deploys is current.")
@click.option("--part", "only", type=click.Choice(PARTS), multiple=True, help="Only this part counts; may be repeated.")
def status(wait: float | None, only: tuple[str, ...]) -> None:
    """Say which parts are up and making progress.

    The exit code is 0 when all are, 1 when one is not, 4 when there is no server, 7 when --wait did not see it happen.
    """
    given = flags()
    found, error = asyncio.run(_wait(given, only, wait) if wait is not None else _once(given, only))
    if given.json:
        json_value(found)
    else:
        _print(found)
    if wait is not None and not found.ready:
        missing = ", ".join(f"{name} ({part.detail})" for name, part in found.parts.items() if not part.up)
        raise TimedOut(f"not ready after {format_seconds(wait)}: {missing}", hint="see `helmr doctor`")
    if error is not None:
        raise error
    if not found.ready:
        raise click.exceptions.Exit(1)


async def _once(given: Flags, only: tuple[str, ...]) -> tuple[Status, HelmrError | None]:
    """The status, and why there is no connection, if there is none."""
    found, error = await _look(given)
    if only:
        parts = {name: part for name, part in found.parts.items() if name in only}
        found = msgspec.structs.replace(found, parts=parts, ready=all(part.up for part in parts.values()))
    return found, error


async def _look(given: Flags) -> tuple[Status, HelmrError | None]:
    settings = given.settings()
    try:
        client = given.client(anywhere=True)
        async with client:
            url = client.wire.nc.connected_url
            parts = await parts_of(client)
    except Unavailable as error:
        return _nothing(settings, error), error
    return _status(settings, f"nats://{url.hostname}:{url.port}" if url is not None else settings.url, parts), None


async def _wait(given: Flags, only: tuple[str, ...], limit: float) -> tuple[Status, HelmrError | None]:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while True:
        found, error = await _once(given, only)
        if isinstance(error, NotAllowed):
            raise error
        if found.ready or loop.time() >= deadline:
            return found, error
        await asyncio.sleep(min(_LOOK, max(deadline - loop.time(), 0)))


def _status(settings: Settings, url: str | None, parts: dict[str, Part]) -> Status:
    ready = all(part.up for part in parts.values())
    return Status(url=url, ready=ready, project=settings.project, environment=settings.env, parts=parts)


def _nothing(settings: Settings, error: HelmrError) -> Status:
    parts = {"nats": Part(up=False, detail=error.message)}
    parts |= {name: Part(up=False, detail="unknown") for name in ("control", "projector", "workers")}
    return _status(settings, settings.url, parts)


async def parts_of(client: AsyncClient) -> dict[str, Part]:
    """What is there, as seen through a connection."""
    answers = await client.status()
    control = answers["control"]
    parts = {
        "nats": _nats(client, control),
        "control": _control(control),
        "projector": _projector(answers["history"]),
        "workers": _workers(control),
    }
    dev = dev_state.read(client.settings.home) if client.settings.url is None else None
    if dev is not None:
        parts["dev"] = await _dev(client, dev)
    return parts


def _nats(client: AsyncClient, control: dict[str, Any] | None) -> Part:
    from helmr.connection import server_version

    nats = client.wire.nc
    version = server_version(nats)
    streams = control["streams"] if control else {}
    stored = sum(stream["bytes"] for stream in streams.values())
    detail = f"nats-server {version}" + (f", {size(stored)} stored" if streams else "")
    return Part(up=nats.is_connected, detail=detail, facts={"version": version, "streams": streams})


def _control(control: dict[str, Any] | None) -> Part:
    if control is None:
        return Part(up=False, detail="does not answer")
    current = control["current"]
    detail = f"helmr {control['version']}, " + (f"deployment {current}" if current else "nothing is deployed here")
    runs: dict[str, int] = control.get("runs", {})  # an older control does not count them
    detail += "".join(f", {number} {name}" for name, number in runs.items() if number)
    return Part(up=True, detail=detail, facts={"version": control["version"], "current": current, "runs": runs})


def _projector(history: dict[str, Any] | None) -> Part:
    if history is None:
        return Part(up=False, detail="does not answer")
    streams = history["streams"]
    behind = sum(max(stream["last"] - stream["applied"], 0) for stream in streams.values())
    lag = max((stream["lag_seconds"] for stream in streams.values()), default=0.0)
    detail = f"{behind} messages and {format_seconds(lag)} behind" if lag else "up to date"
    facts = {"version": history["version"], "lag_seconds": lag, "behind": behind, "streams": streams}
    return Part(up=True, detail=detail, facts=facts)


def _workers(control: dict[str, Any] | None) -> Part:
    if control is None:
        return Part(up=False, detail="unknown: control does not answer")
    from bus.presence import WorkerInfo

    workers = msgspec.convert(control["workers"], list[WorkerInfo])
    told = [
        f"{each.id} ({each.engine}, group {each.group}): {each.running} of {each.slots} slots busy"
        + (f", {each.told}" if each.told else "")
        for each in workers
    ]
    up = any(each.takes_runs for each in workers)
    return Part(up=up, detail="; ".join(told) or "none", facts={"workers": control["workers"]})


async def _dev(client: AsyncClient, dev: dev_state.DevState) -> Part:
    from helmr.client.aio import AsyncClient
    from helmr.project import IGNORE_FILE

    facts: dict[str, Any] = {"root": dev.root, "project": dev.project, "environment": dev.env, "pid": dev.pid}
    try:
        if (dev.project, dev.env) == tuple(client.scope):
            current = await dev_state.is_current(client, Path(dev.root))
        else:
            settings = client.settings
            async with AsyncClient(
                api_key=settings.api_key, project=dev.project, env=dev.env, home=settings.home
            ) as own:
                current = await dev_state.is_current(own, Path(dev.root))
    except HelmrError as error:
        return Part(up=False, detail=f"{dev.root}: {error.message}", facts=facts)
    detail = f"{dev.root} is deployed" if current else f"{dev.root} is not deployed as it stands"
    if dev.left_out and not current:
        detail += f": {', '.join(dev.left_out)} keeps changing; name it in {IGNORE_FILE}"
    return Part(up=current, detail=detail, facts=facts)


def _print(found: Status) -> None:
    note(f"{found.url or 'no server'}")
    rows = [(name, "up" if part.up else "down", part.detail) for name, part in found.parts.items()]
    table(("PART", "STATE", "DETAIL"), rows)
