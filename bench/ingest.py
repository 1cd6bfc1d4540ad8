"""Measures the projector: how fast it catches up with a full log, and how far it lags behind a steady stream.

Run it as ``python bench/ingest.py [--runs N] [--rate EVENTS_PER_SECOND] [--seconds S]``; it starts its own server.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client as Nats

sys.path.insert(0, str(Path(__file__).parent.parent))

from bus import topology
from bus.reader import StreamReader
from bus.requests import api
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr import events, ids, subjects
from helmr.connection import connect
from helmr.events import RunEvent, RunSpec, RunState
from helmr.reducers import run as rules
from helmr.reducers import run_fold
from helmr.subjects import Scope
from store.home import Home
from store.main import tune_interpreter
from store.projector import Projector
from store.sinks import Store

SCOPE = Scope("bench", "dev")
Published = tuple[str, bytes]


def life(number: int, clock: Callable[[], datetime] = events.now) -> Iterator[Published]:
    """The events of one run: start, lease, two steps, and for every other run a wait; then an end. ``clock``: when."""
    run_id = ids.new("run")
    spec = RunSpec(
        session_id=ids.new("ses"),
        workspace_id=ids.new("ws"),
        deployment_id="dep_bench",
        deployment_version="20260101.1",
        task_id=f"task-{number % 7}",
        payload={"number": number, "text": "some words to make it a payload"},
    )
    created = rules.create(spec, cause="start", lane="default")
    lease = {"worker": "wrk_bench", "attempt": 1, "dispatch_attempt": 1}
    step = {"name": "fetch", "result": {"status": 200, "items": [1, 2, 3]}}
    wait: list[tuple[str, dict[str, Any]]] = [
        ("waiting", {"kind": "timer", "due": events.now().isoformat()}),
        ("wait_completed", {}),
    ]
    resumed: list[tuple[str, dict[str, Any]]] = [("queued", {"cause": "resume", "lane": "default"}), ("leased", lease)]
    kinds: list[tuple[str, dict[str, Any]]] = [
        (created.kind, created.data),
        ("leased", lease),
        ("started", {}),
        ("step", step),
        ("step", step),
    ]
    kinds += wait + resumed if number % 2 else []
    kinds.append(("succeeded", {"output": {"ok": True}, "exit_code": 0, "logs": {"stdout": 100}}))
    state: RunState | None = None
    for kind, data in kinds:
        at = clock()
        state = run_fold.apply(state, kind, data, at, run_id=run_id)
        event = RunEvent(
            cursor=state.cursor, id=ids.new("evt"), run_id=run_id, kind=kind, at=at, data=data, state=state
        )
        lane = "default" if kind == "queued" else ""
        yield subjects.event(SCOPE, "run", run_id, kind, lane=lane), msgspec.json.encode(event)


async def fill(nc: Nats, runs: int) -> int:
    """Publish the events of ``runs`` runs; how many there are."""
    count = 0
    for number in range(runs):
        for subject, body in life(number):
            count += 1
            if count % 500:
                await nc.publish(subject, body)
            else:  # an acknowledgement now and then keeps the server from being flooded
                await nc.request(subject, body, timeout=10)
    await nc.request(*next(life(0)), timeout=10)
    return count + 1


async def receive_only(nc: Nats) -> float:
    """Messages per second that arrive if nothing is done with them."""
    arrived = asyncio.Event()
    reader = StreamReader(nc, topology.RUNS, arrived=arrived.set)
    last, began = await reader.last(), time.perf_counter()
    task = asyncio.create_task(reader.run())
    while reader.received < last:
        arrived.clear()
        await arrived.wait()
        reader.take(100_000)
    task.cancel()
    return last / (time.perf_counter() - began)


async def catch_up(nc: Nats, store: Store) -> float:
    """Events per second when the log is full and the history empty."""
    projector = Projector(nc, store)
    await projector.check()
    began = time.perf_counter()
    async with projector.running():
        await projector.fresh(timeout=600)
        return projector.history.applied[topology.RUNS] / (time.perf_counter() - began)


async def lag(nc: Nats, store: Store, rate: int, seconds: float) -> list[float]:
    """Milliseconds from publishing an event to its being applied, at a steady rate."""
    projector = Projector(nc, store)
    await projector.check()
    sent: dict[int, float] = {}
    lags: list[float] = []

    def settled() -> None:
        applied = projector.history.applied[topology.RUNS]
        done = [seq for seq in sent if seq <= applied]
        lags.extend((time.perf_counter() - sent.pop(seq)) * 1000 for seq in done)

    async with projector.running():
        began, count, number = time.perf_counter(), 0, 0
        base = (await api(nc, f"STREAM.INFO.{topology.RUNS}", None))["state"]["last_seq"]
        while time.perf_counter() - began < seconds:
            for subject, body in life(number):
                count += 1
                sent[base + count] = time.perf_counter()
                await nc.publish(subject, body)
                ahead = count / rate - (time.perf_counter() - began)
                if ahead > 0:
                    await asyncio.sleep(ahead)
                settled()
            number += 1
        await projector.fresh(timeout=10)
    return lags


async def main() -> None:
    """Run both measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40_000)
    parser.add_argument("--rate", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    tune_interpreter()
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        nc = await connect(server.url, name="bench")
        await ensure_topology(nc)
        print(f"events in the log: {await fill(nc, options.runs)}")
        gc.collect()
        print(f"receive only: {await receive_only(nc):,.0f} messages/s")
        store = Store(Home(Path(folder) / "history"))
        cpu = time.process_time()
        print(f"catch up: {await catch_up(nc, store):,.0f} events/s, {time.process_time() - cpu:.1f} s of CPU")
        found = sorted(await lag(nc, store, options.rate, options.seconds))
        p95 = found[int(len(found) * 0.95)]
        print(
            f"lag at {options.rate} events/s: p50 {statistics.median(found):.0f} ms, p95 {p95:.0f}, max {found[-1]:.0f}"
        )
        store.close()
        await nc.close()
        await server.stop()


if __name__ == "__main__":
    asyncio.run(main())
