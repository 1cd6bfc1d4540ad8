"""``helmr worker``: leases runs and executes them until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli.artifacts import artifacts_option, look_at
from cli.options import DURATION, Choice, Command, Flags, flags
from cli.output import json_line, note
from cli.process import Stop, first_of
from helmr.durations import format_seconds
from helmr.errors import Unavailable

if TYPE_CHECKING:
    from bus.exposition import Address
    from bus.s3_place import Place
    from worker.engine import Engine, EngineInfo
    from worker.worker import Worker

log = logging.getLogger(__name__)

ENGINES = ["docker", "process"]
#: Containers that are kept ready, unless told otherwise; each holds some 25 MB.
_POOL = 4
#: Seconds after a third signal in which the machines must be gone.
_HURRY = 5.0
#: Seconds beyond those for the runs at which the process ends whatever is still going on.
_LAST_RESORT = 30.0


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What ``helmr worker --json`` says once it takes runs."""

    ready: bool = True
    part: str = "worker"
    id: str
    pid: int
    group: str
    slots: int
    engine: str
    engine_version: str
    isolated: bool
    notes: tuple[str, ...]


def default_slots() -> int:
    """Runs at a time: two for each processor, because most agents wait for a model most of the time."""
    return 2 * (os.cpu_count() or 1)


@click.command(cls=Command)
@click.option(
    "--engine",
    type=Choice(ENGINES),
    default="docker",
    show_default=True,
    help="docker: a container for each workspace; process: plain processes, isolating nothing.",
)
@click.option("--slots", type=click.IntRange(1, 1000), help="Runs at a time; default: two for each processor.")
@click.option(
    "--pool",
    type=click.IntRange(0, 100),
    metavar="N",
    envvar="HELMR_POOL",
    help="Containers started ahead, at most, of the kinds that were wanted lately; default: the slots, at most 4.",
)
@click.option("--group", default="default", show_default=True, help="The group whose queue it works on.")
@click.option(
    "--drain",
    type=DURATION,
    default="30s",
    show_default=True,
    metavar="D",
    help="How long its runs may go on after a signal before they are handed back; 0: not at all.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve metrics to Prometheus there; without a host, on 127.0.0.1. Needs helmr[metrics].",
)
@click.option(
    "--when-cut-off",
    type=Choice(["go-on", "end"]),
    default="go-on",
    show_default=True,
    help="What becomes of its runs while it cannot reach the server; end: their processes are killed before others may take"
    " the runs, for which an outage of the server of 5 s is enough.",
)
@artifacts_option
def worker(engine: str, *, slots: int | None, pool: int | None, metrics: str | None, **options: Any) -> None:
    """Run a worker until SIGINT or SIGTERM.

    Then it takes nothing new, lets its runs end for a while, and hands back to the queue what is left. A second signal hands
    back at once, a third one ends the worker on the spot.
    """
    slots = slots or default_slots()
    pool = min(slots, _POOL) if pool is None else pool
    asyncio.run(_run(flags(), engine, slots=slots, pool=pool, metrics=metrics, **options))


async def _run(
    given: Flags,
    engine_name: str,
    *,
    slots: int,
    pool: int,
    group: str,
    drain: float,
    metrics: str | None,
    artifacts: Place,
    when_cut_off: str,
) -> None:
    from bus.allocator import keep_buffers
    from bus.exposition import Address
    from helmr import local
    from helmr.config import ensure_home
    from helmr.connection import connect, endpoints

    keep_buffers()
    address = Address.parse(metrics) if metrics else None
    stop = Stop(last_resort=drain + _LAST_RESORT)
    stop.listen()
    settings = given.settings()
    home = ensure_home(settings.home)
    await look_at(artifacts)
    engine = _engine(engine_name, home, pool)
    info = await engine.check()
    url = settings.url or local.find(home)
    engine.guard(endpoints(url))
    lost = asyncio.Event()

    async def closed() -> None:
        lost.set()

    nc = await connect(url, name="helmr-worker", token=settings.api_key, on_closed=closed)
    try:
        from worker.worker import Worker

        end = when_cut_off == "end"
        working = Worker(
            nc, engine, info, home=home, slots=slots, group=group, artifacts=artifacts, end_when_cut_off=end
        )
        async with _metrics_of(working, address):
            gone = await _work(working, info, stop, lost, drain=drain, as_json=given.json)
    finally:
        await nc.close()
    if gone:
        raise Unavailable(f"the connection to {url} was closed for good", hint="start the worker again")


@asynccontextmanager
async def _metrics_of(worker: Worker, address: Address | None) -> AsyncIterator[None]:
    """Serve the worker's metrics for the length of a block, if an address was given."""
    if address is None:
        yield
        return
    from bus.exposition import serving
    from worker.metrics import WorkerMetrics

    async with serving(address, WorkerMetrics(worker).read) as url:
        note(f"metrics at {url}")
        yield


def _engine(name: str, home: Path, pool: int) -> Engine:
    if name == "process":
        from worker.process_engine import ProcessEngine

        return ProcessEngine(home)
    from worker.docker_engine import DockerEngine

    return DockerEngine(home, pool=pool)


async def _work(
    worker: Worker, info: EngineInfo, stop: Stop, lost: asyncio.Event, *, drain: float, as_json: bool
) -> bool:
    """Work until a signal comes, or the connection is lost for good: then True."""
    ready, end = asyncio.Event(), asyncio.Event()
    working = asyncio.create_task(worker.run(end, ready, drain=drain, hurry=stop.hurried))
    saying = asyncio.create_task(_say_ready(worker, info, ready, as_json=as_json))
    ending = asyncio.create_task(first_of(stop.asked, lost))
    insisting = asyncio.create_task(stop.insisted.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if lost.is_set() and not stop.asked.is_set():
            await _abandon(worker, working)
            return True
        if drain > 0 and not working.done():
            note(f"stopping: runs have {format_seconds(drain)} to end; again: hand them back at once")
        end.set()
        await asyncio.wait({working, insisting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        else:
            await _abandon(worker, working)
        return False
    finally:
        for task in (saying, ending, insisting, working):
            task.cancel()


async def _abandon(worker: Worker, working: asyncio.Task[None]) -> None:
    """Stop at once: another worker finds the runs by their ack deadline, but nobody else ends our machines now."""
    working.cancel()
    await asyncio.wait({working})
    try:
        async with asyncio.timeout(_HURRY):
            await worker.engine.close()
    except TimeoutError:
        log.warning("some machines were left; they end by themselves, or the next worker of this home removes them")


async def _say_ready(worker: Worker, info: EngineInfo, ready: asyncio.Event, *, as_json: bool) -> None:
    if not info.isolated:
        note(f"WARNING: the {info.name} engine isolates nothing: {'; '.join(info.notes)}")
    await ready.wait()
    slots, group = worker.slots.total, worker.group
    if as_json:
        said = Ready(
            id=worker.id,
            pid=os.getpid(),
            group=group,
            slots=slots,
            engine=info.name,
            engine_version=info.version,
            isolated=info.isolated,
            notes=info.notes,
        )
        json_line(said)
    else:
        notes = f" ({', '.join(info.notes)})" if info.isolated and info.notes else ""
        note(f"worker {worker.id}: {info.name} {info.version}{notes}, {slots} slots, group {group}; Ctrl-C stops it")
