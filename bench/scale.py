"""What a long history costs: the same measurements over a log with few, many and very many finished runs.

    .venv/bin/python -m bench.scale --finished 1000 100000

The log is filled with whole lives (session, workspace, run: six messages each) and the server is killed. Measured are its
restart, the start of control (which folds the live runs, with and without a checkpoint), the making of a lane, reads of single
runs, and no-op runs from their ``queued`` to their ``leased`` event, with fsync on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client as Nats
from nats.js.api import ConsumerConfig, DeliverPolicy

from bench.installation import PROJECT
from bus import topology
from bus.control import Control
from bus.keyring import KeyRing
from bus.log import RUN, SESSION, WORKSPACE, Kind, Log
from bus.pull import ensure_consumer
from bus.requests import api
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr import events, ids, subjects
from helmr.client import AsyncClient
from helmr.connection import connect
from helmr.events import Draft, RunSpec
from helmr.reducers import run as run_rules
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Scope
from worker.process_engine import ProcessEngine
from worker.worker import Worker

_SCOPE = Scope("acme", "bench")
#: The lane of those lives: whoever served it has acknowledged all of it.
_PAST = "past"
#: Lives sent before the server has to have stored them: it drops what is too far ahead.
_AHEAD = 500
_READS = 300
_reactor_consumer = topology.reactor_consumer


def life() -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    """The ids of one finished run, and its messages: a template for all others."""
    named = {kind: ids.new(prefix) for kind, prefix in (("run", "run"), ("session", "ses"), ("workspace", "ws"))}
    spec = RunSpec(
        session_id=named["session"],
        workspace_id=named["workspace"],
        deployment_id=ids.new("dep"),
        deployment_version="20260101.1",
        task_id="review",
        payload={"pr": 42},
    )
    opened = {
        "task_id": "review",
        "workspace_id": spec.workspace_id,
        "deployment_id": spec.deployment_id,
        "run_id": named["run"],
    }
    create = workspace_rules.create(sandbox="default", fingerprint="f", deployment_id="dep", mount_path="/workspace")
    leased = {"worker": ids.new("wrk"), "attempt": 1, "dispatch_attempt": 1}
    told: list[tuple[Kind[Any, Any], Draft]] = [
        (SESSION, Draft(kind="opened", data=opened)),
        (WORKSPACE, create),
        (RUN, run_rules.create(spec, cause="start", lane="default")),
        (RUN, Draft(kind="leased", data=leased, source="worker")),
        (RUN, Draft(kind="started", source="worker")),
        (RUN, Draft(kind="succeeded", data={"output": {"ok": True}, "exit_code": 0}, source="worker")),
    ]
    states: dict[str, Any] = {}
    messages = []
    for kind, draft in told:
        event = kind.make(states.get(kind.name), named[kind.name], draft)
        states[kind.name] = event.state
        lane = _PAST if draft.kind == "queued" else ""
        subject = subjects.event(_SCOPE, kind.name, named[kind.name], draft.kind, lane=lane)
        messages.append((subject, msgspec.json.encode(event)))
    return named, messages


async def fill(nc: Nats, finished: int) -> list[str]:
    """Store that many lives; the ids of the runs."""
    named, template = life()
    cuts = re.compile("(" + "|".join(named.values()) + ")")
    places = {value: place for place, value in enumerate(named.values())}
    # Texts, and between them whose id comes there: quicker than to look for the ids in each of millions of messages.
    cut = [[[places.get(part, part) for part in cuts.split(text)] for text in (s, b.decode())] for s, b in template]
    prefixes = [value.partition("_")[0] for value in named.values()]
    runs = []
    for number in range(finished):
        news = [ids.new(prefix) for prefix in prefixes]
        runs.append(news[0])
        for message in cut:
            subject, body = ("".join(news[p] if isinstance(p, int) else p for p in parts) for parts in message)
            await nc.publish(subject, body.encode())
        if number % _AHEAD == 0:
            await stored(nc, (number + 1) * len(template))
    await stored(nc, finished * len(template))
    return runs


async def stored(nc: Nats, count: int) -> None:
    """Until the log has so many messages."""
    async with asyncio.timeout(60):
        while (await nc.jetstream().stream_info(topology.RUNS)).state.messages < count:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def _from_now_on(name: str, kinds: list[str]) -> ConsumerConfig:
    """A reactor that has acknowledged the past: it would take it hours to see a million lives that it never missed."""
    return _reactor_consumer(name, kinds).evolve(deliver_policy=DeliverPolicy.NEW)


@asynccontextmanager
async def controlled(url: str) -> AsyncIterator[tuple[Control, float]]:
    """Control, once it knows the live runs; and the seconds that took. Its reactors have seen the past already."""
    topology.reactor_consumer = _from_now_on
    nc = await connect(url, name="control")
    control = Control(nc, KeyRing())
    began = time.perf_counter()
    stop = asyncio.Event()

    async def live() -> None:
        async with asyncio.TaskGroup() as tasks:
            inner = tasks.create_task(control.start(tasks))
            await inner
            ready.set()
            await stop.wait()
            raise asyncio.CancelledError

    ready = asyncio.Event()
    task = asyncio.create_task(live())
    await ready.wait()
    await control.live_follower.ready.wait()
    try:
        yield control, time.perf_counter() - began
    finally:
        task.cancel()
        await asyncio.wait({task})
        control.close()
        await nc.close()


def spread(values: list[float]) -> str:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered) * 1e3:.1f} p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms"


async def reads(log: Log, runs: list[str]) -> str:
    """The last event of single runs, from all over the log."""
    step = max(len(runs) // _READS, 1)
    taken = []
    for run_id in runs[::step][:_READS]:
        began = time.perf_counter()
        await log.present(RUN, _SCOPE, run_id)
        taken.append(time.perf_counter() - began)
    return spread(taken)


async def dispatch(url: str, home: Path, starts: int) -> str:
    """No-op runs, one after the other, from queued to leased."""
    nc = await connect(url, name="worker")
    engine = ProcessEngine(home / "engine")
    worker = Worker(nc, engine, await engine.check(), home=home, slots=2)
    stop, ready = asyncio.Event(), asyncio.Event()
    working = asyncio.create_task(worker.run(stop, ready))
    await ready.wait()
    taken = []
    async with AsyncClient(url, project="bench", env="dev", home=home) as client:
        await client.deployments.deploy(PROJECT)
        workspace = None
        for _ in range(starts):
            started = await client.sessions.start("noop", workspace=workspace)
            workspace = started.session.workspace_id
            run = await started.run.wait(timeout=60)
            at = {event.kind: event.at for event in await client.runs.events.list(run)}
            taken.append((at["leased"] - at["queued"]).total_seconds())
    stop.set()
    await working
    await nc.close()
    return spread(taken[5:])


async def measure(finished: int, starts: int) -> None:
    """One log, measured and printed."""
    with tempfile.TemporaryDirectory(prefix="helmr-bench-") as folder:
        home = Path(folder)
        server = EmbeddedServer(home, durability="relaxed")
        await server.start()
        nc = await connect(server.url, name="bench")
        await ensure_topology(nc)
        began = time.perf_counter()
        runs = await fill(nc, finished)
        print(f"{finished:,} finished runs (filled in {time.perf_counter() - began:.0f} s)", flush=True)
        await nc.close()
        if server.pid is not None:
            os.kill(server.pid, signal.SIGKILL)
        await server.stop()
        await after_restart(home, runs, starts)


async def after_restart(home: Path, runs: list[str], starts: int) -> None:
    """All that is measured."""
    server = EmbeddedServer(home, durability="strict")
    began = time.perf_counter()
    await server.start()
    nc = await connect(server.url, name="bench")
    await nc.jetstream().stream_info(topology.RUNS)
    print(f"  server back after kill -9     {time.perf_counter() - began:.2f} s")
    async with controlled(server.url) as (control, taken):
        print(f"  control, no checkpoint        {taken:.2f} s")
        await control.live_follower.save((await api(nc, f"STREAM.INFO.{topology.RUNS}", None))["created"])
    async with controlled(server.url) as (control, taken):
        print(f"  control, from a checkpoint    {taken:.2f} s")
        began = time.perf_counter()
        await ensure_consumer(nc, topology.RUNS, topology.lane_consumer("@wrk_new").as_dict())
        print(f"  a lane is made                {(time.perf_counter() - began) * 1e3:.0f} ms")
        print(f"  the state of a run is read    {await reads(control.log, runs)}")
        print(f"  queued to leased              {await dispatch(server.url, home, starts)}")
        resident = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        info = await nc.jetstream().stream_info(topology.RUNS)
        print(f"  nats-server                   {resident >> 20} MB resident, {info.state.bytes >> 20} MB stored")
    await nc.close()
    await server.stop()


async def main() -> None:
    """Measure one log after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--starts", type=int, default=100)
    options = parser.parse_args()
    print(f"as of {events.now():%Y-%m-%d %H:%M} UTC, {options.starts} starts each")
    for finished in options.finished:
        await measure(finished, options.starts)


if __name__ == "__main__":
    asyncio.run(main())
