"""Fills a history with runs, events and log text, and measures how fast it takes them in and how fast it answers.

    .venv/bin/python -m bench.history --runs 40000 --log-megabytes 200 [--asks 100]

Server and projector are processes of their own (durability relaxed); a run has 6 or 10 events, and its share of the log text.
1,250,000 runs and 5,120 MB are ten million events and 5 GB. Answers are timed through the client, one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from nats.aio.client import Client as Nats

from bench.ingest import SCOPE, life
from bench.projection import projector, spent
from bus import topology, watermark
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr import events, subjects
from helmr.chunks import headers
from helmr.client import AsyncClient
from helmr.connection import connected

#: Bytes of a log chunk, as a chatty run leaves them.
_CHUNK = 16 * 1024
#: Messages between two waits for the server, so that it is not flooded.
_FLUSH = 500
_HOURLY = """
    SELECT date_trunc('hour', created_at) AS hour, task_id, count(*), count(*) FILTER (status = 'succeeded'),
      quantile_cont(duration_seconds, [0.5, 0.95, 0.99])
    FROM runs WHERE created_at > now() - INTERVAL 1 day GROUP BY ALL ORDER BY ALL"""


def words(length: int) -> bytes:
    """Lines of log that compress about as logs do."""
    lines: list[str] = []
    size = 0
    while size < length:
        number = random.randrange(10**6)  # noqa: S311  # filler
        lines.append(
            f"{events.now().isoformat()} INFO request {number} took {number % 997} ms, {number % 13} retries\n"
        )
        size += len(lines[-1])
    return "".join(lines).encode()[:length]


async def fill(nc: Nats, runs: int, log_bytes: int) -> tuple[int, list[str]]:
    """Publish the runs and their logs; how many events there are, and some of the runs."""
    text, told, some = words(4 * 1024**2), 0, []
    share = log_bytes // runs
    for number in range(runs):
        run_id = ""
        for subject, body in life(number):
            run_id = subjects.parse_event(subject).id
            await nc.publish(subject, body)
            told += 1
            if told % _FLUSH == 0:
                await nc.flush(60)
        await write(nc, run_id, text, number, share)
        if number % max(runs // 200, 1) == 0:
            some.append(run_id)
    await nc.flush(60)
    return told, some


async def write(nc: Nats, run_id: str, text: bytes, number: int, share: int) -> None:
    """Publish a run's share of the log text, in chunks."""
    for offset in range(0, share, _CHUNK):
        size = min(_CHUNK, share - offset)
        start = (number * 7919 + offset) % (len(text) - size)
        fields = headers(offset=offset, dispatch=1, at=events.now())
        await nc.publish(subjects.log(SCOPE, run_id, 1, "stdout"), text[start : start + size], headers=fields)


async def applied(nc: Nats) -> None:
    """Return when everything is in the history."""
    js = nc.jetstream()
    ends = {name: (await js.stream_info(name)).state.last_seq for name in (topology.RUNS, topology.LOGS)}
    while True:
        found = await watermark.read(nc)
        if found is not None and all(found.covers(stream, seq) for stream, seq in ends.items()):
            return
        await asyncio.sleep(0.1)


async def timed(what: str, asks: int, pid: int, ask: Callable[[], Awaitable[object]]) -> None:
    """Ask so many times and print how long the answers took, and what they cost the projector on average."""
    took = []
    before = spent(pid)
    for _ in range(asks):
        began = time.perf_counter()
        await ask()
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    cost = (spent(pid) - before) / asks * 1000
    print(f"{what}: p50 {took[asks // 2]:.1f} ms, p95 {took[int(asks * 0.95)]:.1f} ms; processor {cost:.1f} ms")


async def questions(client: AsyncClient, pid: int, some: list[str], asks: int) -> None:
    """The usual ones, in the ways the command line asks them."""
    wire, last = client.wire, {"limit": 20, "fresh": False}
    pick = random.Random(1).choice  # noqa: S311  # some runs
    await timed("run list", asks, pid, lambda: wire.call("history", "runs", last, dict))
    await timed("a run's events", asks, pid, lambda: wire.call("history", "events", {"run_id": pick(some)}, dict))
    await timed("a run's logs", asks, pid, lambda: wire.call("history", "logs", {"run_id": pick(some)}, dict))
    await timed("hourly analytics of a day, as SQL", min(asks, 20), pid, lambda: client.query(_HOURLY))


def memory(pid: int) -> int:
    """The most resident memory a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40_000)
    parser.add_argument("--log-megabytes", type=int, default=200)
    parser.add_argument("--asks", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        async with connected(server.url, name="bench") as nc:
            await ensure_topology(nc)
            told, some = await fill(nc, options.runs, options.log_megabytes * 1024**2)
            print(f"{options.runs} runs, {told} events, {options.log_megabytes} MB of log text")
            began = time.perf_counter()
            async with projector(server.url, Path(folder) / "history") as pid:
                await applied(nc)
                seconds, used = time.perf_counter() - began, spent(pid)
                print(
                    f"taken in: {told / seconds:,.0f} events/s and {options.log_megabytes / seconds:.1f} MB/s of logs"
                )
                print(
                    f"processor time: {used:.1f} s, {told / used:,.0f} events for each second of it; {memory(pid)} MiB"
                )
                async with AsyncClient(server.url, project=SCOPE.project, env=SCOPE.environment) as client:
                    await questions(client, pid, some, options.asks)
                files = sum(path.stat().st_size for path in (Path(folder) / "history").rglob("*") if path.is_file())
                print(f"files of the history: {files / 1024**2:.0f} MB; memory at most {memory(pid)} MiB")
        await server.stop()


if __name__ == "__main__":
    asyncio.run(main())
