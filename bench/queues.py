"""Thousands of queued no-op runs under a limit: how many a second, and whether order and limits held, from the log.

    .venv/bin/python -m bench.queues --limit none --runs 10000
    .venv/bin/python -m bench.queues --limit one --runs 1000
    .venv/bin/python -m bench.queues --limit four --keys 10

All runs are started first, as fast as one client can, while the workers are at it already. With ``--keys`` N they share N
concurrency keys, the first of which gets nine runs in ten. At the end the whole log is read: the most runs that had a slot at
the same time, how many runs were dispatched before one of the same key that had been waiting longer, and how long each key's
runs were held. With ``--worker simulated`` runs are leased and ended without executing anything: what is measured then is
control, the log and the queue alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec

from bench.installation import installation, server
from bus import topology
from bus.log import RUN, Log, Position
from bus.presence import WorkerInfo, announce
from bus.pull import Delivery, Puller, ensure_consumer
from bus.reader import StreamReader
from helmr import events, subjects
from helmr.client import AsyncClient
from helmr.events import Draft, RunEvent
from helmr.reducers import run as rules

_STARTERS = 64
_WORKER = "wrk_bench"


class Found(NamedTuple):
    """What the log says."""

    most: int
    most_of_a_key: int
    overtaken: int
    held: int
    waits: dict[str | None, list[float]]


async def start_all(client: AsyncClient, runs: int, queue: str | None, keys: int, workspaces: list[str]) -> None:
    """Start the runs, so many at a time."""
    limit = asyncio.Semaphore(_STARTERS)

    async def one(number: int) -> None:
        key = None if keys == 0 else f"key-{0 if number % 10 else number // 10 % keys}"
        place = workspaces[number % len(workspaces)] if workspaces else None
        async with limit:
            await client.sessions.start("noop", queue=queue, concurrency_key=key, workspace=place)

    await asyncio.gather(*(one(number) for number in range(runs)))


class Ends:
    """Counts the runs that have ended."""

    def __init__(self, wanted: int) -> None:
        self.left = wanted
        self.all = asyncio.Event()

    async def note(self, _msg: object) -> None:
        """One more."""
        self.left -= 1
        if self.left == 0:
            self.all.set()


async def simulate(client: AsyncClient, slots: int) -> None:
    """Lease and end whatever is dispatched, ``slots`` at a time, and execute nothing."""
    nc = client.wire.nc
    log = Log(nc)
    config = topology.lane_consumer("default")
    await ensure_consumer(nc, topology.RUNS, config.as_dict())
    limit = asyncio.Semaphore(slots)

    async def work(item: Delivery) -> None:
        try:
            event = RUN.decode(item.msg.data)
            position: Position[RunEvent] = Position(item.stream_seq, event)
            leased = rules.lease(event.state, worker=_WORKER, dispatch=event.cursor)
            position = await log.append(RUN, client.scope, event.run_id, position, leased)
            await log.append(RUN, client.scope, event.run_id, position, Draft(kind="succeeded", source="worker"))
            await item.msg.ack()
        finally:
            limit.release()

    async with (
        Puller(nc, topology.RUNS, topology.lane_consumer_name("default")) as puller,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(seem_alive(client, slots))
        while True:
            async for item in puller.pull(slots):
                await limit.acquire()
                tasks.create_task(work(item))


async def seem_alive(client: AsyncClient, slots: int) -> None:
    """Renew the simulated worker's presence, or its runs would be rescued."""
    about = {"id": _WORKER, "host": "bench", "group": "default", "engine": "none", "isolated": False, "running": 0}
    told = {**about, "slots": slots, "started_at": events.now(), "version": "bench"}
    while True:
        await announce(client.wire.nc, msgspec.convert(told, WorkerInfo))
        await asyncio.sleep(topology.HEARTBEAT)


async def read_log(client: AsyncClient) -> Found:
    """Fold all run events."""
    arrived = asyncio.Event()
    filters = [subjects.lane("*"), *(subjects.of_kind("run", kind) for kind in ("held", "succeeded"))]
    reader = StreamReader(client.wire.nc, topology.RUNS, filters=filters, arrived=arrived.set)
    reading = asyncio.create_task(reader.run())
    told: list[RunEvent] = []
    while not reader.caught_up.is_set() or len(
        reader
    ):  # it buffers only so much, and is told to go on by being emptied
        told += [RUN.decode(message.body) for message in reader.take(1000)]
        await asyncio.sleep(0 if len(reader) else 0.01)
    found = judge(told)
    reading.cancel()
    await asyncio.wait({reading})
    return found


def judge(told: Iterable[RunEvent]) -> Found:
    """Peaks and order, from the events in the order of the log."""
    used: Counter[str | None] = Counter()
    waiting: defaultdict[str | None, dict[str, float]] = defaultdict(dict)
    waits: defaultdict[str | None, list[float]] = defaultdict(list)
    most = most_of_a_key = overtaken = held = 0
    for event in told:
        key, state = event.state.concurrency_key, event.state
        if event.kind == "held":
            held += 1
            waiting[key][event.run_id] = state.queued_at.timestamp() if state.queued_at else 0.0
        elif event.kind == "queued":
            since = waiting[key].pop(event.run_id, None)
            if since is not None:
                overtaken += any(other < since for other in waiting[key].values())
                waits[key].append(event.at.timestamp() - since)
            used[key] += 1
            most, most_of_a_key = max(most, used.total()), max(most_of_a_key, used[key])
        else:
            used[key] -= 1
    return Found(most, most_of_a_key, overtaken, held, dict(waits))


@asynccontextmanager
async def without_worker() -> AsyncIterator[AsyncClient]:
    """An installation whose worker is simulated."""
    async with server() as running:
        yield running.client


@asynccontextmanager
async def with_worker(slots: int) -> AsyncIterator[AsyncClient]:
    """An installation with the process engine."""
    async with installation("process", slots) as running:
        yield running.client


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", choices=("none", "one", "four", "fair"), default="none")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=0, help="concurrency keys; 0: runs have none")
    parser.add_argument("--live", type=int, default=4, help="live workspaces that the runs share")
    parser.add_argument("--worker", choices=("process", "simulated"), default="process")
    parser.add_argument("--slots", type=int, default=8)
    options = parser.parse_args()
    simulated = options.worker == "simulated"
    async with without_worker() if simulated else with_worker(options.slots) as client:
        workspaces: list[str] = []
        if not simulated:
            for _ in range(options.live):
                started = await client.sessions.start("noop")
                await started.run.wait()
                workspaces.append(started.session.workspace_id)
        ends = Ends(options.runs)
        await client.wire.nc.subscribe(subjects.live(client.scope, "run", "*", "succeeded"), cb=ends.note)
        working = asyncio.create_task(simulate(client, options.slots)) if simulated else None
        began = time.perf_counter()
        queue = None if options.limit == "none" else options.limit
        await start_all(client, options.runs, queue, options.keys, workspaces)
        started_in = time.perf_counter() - began
        await ends.all.wait()
        took = time.perf_counter() - began
        if working is not None:
            working.cancel()
        found = await read_log(client)
    report(options.runs, started_in, took, found)


def report(runs: int, started_in: float, took: float, found: Found) -> None:
    """What was measured."""
    print(f"{runs} runs: started in {started_in:.1f} s ({runs / started_in:.0f}/s), all ended after {took:.1f} s")
    print(f"{runs / took:.0f} runs/s; {found.held} were held; out of order: {found.overtaken}")
    print(f"most at the same time: {found.most}; of one key: {found.most_of_a_key}")
    for key, waits in sorted(found.waits.items(), key=lambda item: -len(item[1]))[:4]:
        print(f"held, key {key}: {len(waits)} runs, median {statistics.median(waits):.2f} s, max {max(waits):.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
