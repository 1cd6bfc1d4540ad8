"""Measures what the projector costs while runs come steadily: processor time per run, and how old what it shows is.

    .venv/bin/python -m bench.projection --rate 400 --seconds 10 [--lag]

Server and projector are processes of their own; the runs are told, not executed: nine messages each (session, workspace, run,
one log chunk), one every 10 ms. ``--lag`` asks the projector four times a second how old the last message it has applied is,
which costs it something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from nats.aio.client import Client as Nats

from bus import topology, watermark
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr import subjects
from helmr.chunks import headers
from helmr.connection import connected
from tests.lives import SCOPE, Life, session, workspace

Told = list[tuple[str, bytes, dict[str, str] | None]]
_TICK = 0.01


def tell(number: int) -> Told:
    """The messages of one short run that succeeds."""
    life = Life(start=datetime.now(UTC), task_id=f"task-{number % 7}").queued().leased().succeeds({"ok": True})
    events = [*session(life), *workspace(life, live=True), *life.published()]
    fields = headers(offset=0, dispatch=1, at=life.at)
    chunk = (subjects.log(SCOPE, life.id, 1, "stdout"), b"hello world\n" * 5, fields)
    return [*((subject, body, None) for subject, body in events), chunk]


async def publish(nc: Nats, told: list[Told], rate: int) -> float:
    """Publish the runs at a steady rate, their messages interleaved; the seconds it took."""
    began, begun = time.perf_counter(), 0
    under_way: list[Iterator[tuple[str, bytes, dict[str, str] | None]]] = []
    ticks = 0
    while begun < len(told) or under_way:
        ticks += 1
        upto = min(round(rate * ticks * _TICK), len(told))
        under_way += [iter(run) for run in told[begun:upto]]
        begun = upto
        going_on = []
        for run in under_way:
            if (message := next(run, None)) is not None:
                await nc.publish(message[0], message[1], headers=message[2])
                going_on.append(run)
        under_way = going_on
        await asyncio.sleep(max(began + ticks * _TICK - time.perf_counter(), 0))
    await nc.flush()
    return time.perf_counter() - began


@asynccontextmanager
async def projector(url: str, home: Path, *options: str) -> AsyncIterator[int]:
    """A projector's process; its id."""
    command = [sys.executable, "-m", "store.main", "--url", url, "--home", str(home), *options]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        if process.stderr is None or b"ready" not in await process.stderr.readline():
            raise SystemExit("the projector did not start")
        yield process.pid
    finally:
        process.terminate()
        await process.wait()


def spent(pid: int) -> float:
    """Seconds of processor time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def look(nc: Nats, lags: list[float]) -> None:
    """Note the lag in milliseconds, for ever."""
    while True:
        answer = await nc.request(subjects.api(SCOPE, "history", "status"), b"{}", timeout=10)
        lags.append(json.loads(answer.data)["streams"][topology.RUNS]["lag_seconds"] * 1000)
        await asyncio.sleep(0.23)


async def applied(nc: Nats) -> None:
    """Return when the watermark says that all of RUNS is in the history."""
    last = (await nc.jetstream().stream_info(topology.RUNS)).state.last_seq
    while True:
        found = await watermark.read(nc)
        if found is not None and found.covers(topology.RUNS, last):
            return
        await asyncio.sleep(0.1)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=400)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--lag", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        async with connected(server.url, name="bench") as nc:
            await ensure_topology(nc)
            told = [tell(number) for number in range(options.rate * options.seconds)]
            async with projector(server.url, Path(folder) / "history") as pid:
                lags: list[float] = []
                looking = asyncio.create_task(look(nc, lags)) if options.lag else None
                before = spent(pid)
                seconds = await publish(nc, told, options.rate)
                await applied(nc)
                used = spent(pid) - before
                if looking is not None and not looking.cancel():
                    looking.result()  # it has failed: say why
        await server.stop()
    print(f"{len(told) / seconds:.0f} runs/s, {sum(map(len, told)) / seconds:,.0f} messages/s")
    print(f"processor time per run: {used / len(told) * 1000:.2f} ms, {used / seconds:.0%} of one core")
    if lags:
        lags.sort()
        print(f"lag: p50 {statistics.median(lags):.0f} ms, p95 {lags[int(len(lags) * 0.95)]:.0f}, max {lags[-1]:.0f}")


if __name__ == "__main__":
    asyncio.run(main())
