"""Fills a history with runs, events and log text; measures how fast it takes them in, how far it lags and how fast it answers.

    .venv/bin/python -m bench.history --scale 0.05

Scale 1 is ten million events (1,250,000 runs of 6 or 10 events, spread over thirty days) and 5 GB of log text. Server and
projector are processes of their own (durability relaxed). First the log is filled, then the projector takes it in; then events
come at a steady rate beside two readers, at first alone and then faster and with logs; in the end the usual questions are timed
through the client, one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

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

#: What scale 1 is: runs, of 8 events on average, and bytes of log text.
_RUNS, _LOG_BYTES = 1_250_000, 5 * 1024**3
#: Seconds ahead of its time a message may be sent: sleeping less costs more than it helps.
_TICK = 0.005
#: Seconds of steady events before the lag is looked at, and between two looks.
_WARM_UP, _LOOK = 3.0, 0.23
#: How long ago the first run was created, and the days that stay in the database: all of them.
_SPAN, _HOT = timedelta(days=30), ("--archive-after", "60")
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
        run_id, ago = "", _SPAN * (1 - number / runs)
        for subject, body in life(number, lambda ago=ago: events.now() - ago):  # type: ignore[misc]
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
    for subject, body, fields in chunks(run_id, text, number, share):
        await nc.publish(subject, body, headers=fields)


def chunks(run_id: str, text: bytes, number: int, share: int) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """A run's share of the log text."""
    for offset in range(0, share, _CHUNK):
        size = min(_CHUNK, share - offset)
        start = (number * 7919 + offset) % (len(text) - size)
        fields = headers(offset=offset, dispatch=1, at=events.now())
        yield subjects.log(SCOPE, run_id, 1, "stdout"), text[start : start + size], fields


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
    took: list[float] = []
    before = spent(pid)
    for _ in range(asks):
        await clock(took, ask)
    cost = (spent(pid) - before) / asks * 1000
    print(f"{what}: {shares(took)}; processor {cost:.1f} ms", flush=True)


async def clock(took: list[float], ask: Callable[[], Awaitable[object]]) -> None:
    """Ask once, and note the milliseconds."""
    began = time.perf_counter()
    await ask()
    took.append((time.perf_counter() - began) * 1000)


def shares(took: list[float]) -> str:
    """Median, 95th percentile and maximum of milliseconds."""
    took.sort()
    shown = (f"p{share} {took[len(took) * share // 100]:.1f} ms" for share in (50, 95))
    return f"{', '.join(shown)}, max {took[-1]:.1f} ms" if took else "never seen"


async def questions(client: AsyncClient, pid: int, some: list[str], asks: int) -> None:
    """The usual ones, in the ways the command line asks them."""
    wire, last = client.wire, {"limit": 20, "fresh": False}
    pick = random.Random(1).choice  # noqa: S311  # some runs
    await timed("run list", asks, pid, lambda: wire.call("history", "runs", last, dict))
    await timed("a run's events", asks, pid, lambda: wire.call("history", "events", {"run_id": pick(some)}, dict))
    await timed("a run's logs", asks, pid, lambda: wire.call("history", "logs", {"run_id": pick(some)}, dict))
    await timed("hourly analytics of a day, as SQL", asks, pid, lambda: client.query(_HOURLY))


class Flow(NamedTuple):
    """What comes in steadily: events and bytes of log text, each second."""

    rate: int
    log_rate: int = 0

    def messages(self, seconds: float) -> list[tuple[str, bytes, dict[str, str] | None]]:
        """As many as come in so many seconds; each run has its share of log text before its end."""
        text = words(4 * 1024**2) if self.log_rate else b""
        told: list[tuple[str, bytes, dict[str, str] | None]] = []
        for number in range(int(self.rate * seconds / 8)):
            run = [(subject, body, None) for subject, body in life(number)]
            told += run[:-1]
            told += chunks(subjects.parse_event(run[0][0]).id, text, number, self.log_rate * 8 // self.rate)
            told.append(run[-1])
        return told


#: What comes steadily while two readers ask; and while somebody asks for analytics.
FLOWS, QUIET = (Flow(5_000), Flow(10_000, 10 * 1024**2)), Flow(200)


async def steady(nc: Nats, flow: Flow, seconds: float, *readers: Coroutine[Any, Any, None]) -> None:
    """Publish at a rate while readers ask, and print how old the history is meanwhile."""
    told = flow.messages(seconds)
    pace = len(told) / seconds
    lags: dict[str, list[float]] = {topology.RUNS: [], topology.LOGS: []}
    beside = [asyncio.create_task(watch(nc, lags)), *map(asyncio.create_task, readers)]
    began = time.perf_counter()
    for at, (subject, body, fields) in enumerate(told):
        await nc.publish(subject, body, headers=fields)
        ahead = at / pace - (time.perf_counter() - began)
        if ahead > _TICK:
            await asyncio.sleep(ahead)
    await nc.flush(60)
    reached = seconds / (time.perf_counter() - began)
    for task in beside:
        if not task.cancel():
            task.result()  # it has failed: say why
    print(f"at {reached * flow.rate:,.0f} events/s and {reached * flow.log_rate / 1024**2:.1f} MB/s of logs:")
    for stream, found in lags.items():
        print(f"  lag of {stream}: {shares(found)} ({len(found)} looks)", flush=True)


async def watch(nc: Nats, lags: dict[str, list[float]]) -> None:
    """Note the lag of each stream in milliseconds, for ever, once messages flow."""
    await asyncio.sleep(_WARM_UP)
    while True:
        answer = await nc.request(subjects.api(SCOPE, "history", "status"), b"{}", timeout=10)
        streams = json.loads(answer.data)["streams"]
        for stream, found in lags.items():
            found.append(streams[stream]["lag_seconds"] * 1000)
        await asyncio.sleep(_LOOK)


async def read(client: AsyncClient, some: list[str]) -> None:
    """Look at lists and runs, ten times a second, for ever."""
    pick = random.Random(2).choice  # noqa: S311  # some runs
    while True:
        await client.wire.call("history", "runs", {"limit": 20, "fresh": False}, dict)
        await client.wire.call("history", "logs", {"run_id": pick(some)}, dict)
        await asyncio.sleep(0.1)


async def inquire(client: AsyncClient, took: list[float]) -> None:
    """Have the hours of a day summed up, once a second, for ever."""
    while True:
        await asyncio.sleep(1)
        await clock(took, lambda: client.query(_HOURLY))


def memory(pid: int) -> int:
    """The most resident memory a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.05, help="1: ten million events, 5 GB of log text")
    parser.add_argument("--asks", type=int, default=100, help="how often each question is asked")
    parser.add_argument("--seconds", type=float, default=20, help="how long events come at each steady rate")
    options = parser.parse_args()
    runs, log_bytes = round(_RUNS * options.scale), round(_LOG_BYTES * options.scale)
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        async with connected(server.url, name="bench") as nc:
            await ensure_topology(nc)
            began = time.perf_counter()
            told, some = await fill(nc, runs, log_bytes)
            megabytes = log_bytes / 1024**2
            filled = time.perf_counter() - began
            print(
                f"{runs:,} runs, {told:,} events, {megabytes:,.0f} MB of log text; the log was filled in {filled:.0f} s"
            )
            began = time.perf_counter()
            async with projector(server.url, Path(folder) / "history", *_HOT) as pid:
                await applied(nc)
                seconds, used = time.perf_counter() - began, spent(pid)
                pace = f"{told / seconds:,.0f} events/s and {megabytes / seconds:.1f} MB/s of logs"
                print(f"taken in: {pace}, {seconds:.0f} s in all", flush=True)
                print(
                    f"processor time: {used:.1f} s, {told / used:,.0f} events for each second of it; {memory(pid)} MiB"
                )
                async with AsyncClient(server.url, project=SCOPE.project, env=SCOPE.environment) as client:
                    for flow in FLOWS:
                        await steady(nc, flow, options.seconds, read(client, some), read(client, some))
                        await applied(nc)
                    took: list[float] = []
                    await steady(nc, QUIET, options.seconds, inquire(client, took))
                    print(f"  hourly analytics of a day, as SQL: {shares(took)}")
                    await applied(nc)
                    await questions(client, pid, some, options.asks)
                files = sum(path.stat().st_size for path in (Path(folder) / "history").rglob("*") if path.is_file())
                print(f"files of the history: {files / 1024**2:.0f} MB; memory at most {memory(pid)} MiB")
        await server.stop()


if __name__ == "__main__":
    asyncio.run(main())
