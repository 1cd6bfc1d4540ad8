"""Fills a history with runs, events and log text; measures how fast it takes them in, how far it lags and how fast it answers.

    .venv/bin/python -m bench.history --scale 0.05

Scale 1 is ten million events (1,250,000 runs of 6 or 10 events, spread over thirty days) and 5 GB of log text. Server and
projector are processes of their own (durability relaxed). First the log is filled, then the projector takes it in; then events
come at a steady rate beside two readers, at first alone and then faster and with logs; in the end the usual questions are timed
through the client, one at a time. The last lines say all of it again, each figure beside its aim.

Scale 1 takes a quarter of an hour on a quiet machine of two cores, with 6 GB of memory for the server and 20 GB of
disk (``TMPDIR``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
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


class Figure(NamedTuple):
    """What was measured, in ``unit``; ``aim`` is the least of a rate and the most of anything else, if there is one."""

    what: str
    found: float
    unit: str
    aim: float | None = None

    @property
    def verdict(self) -> str:
        """The aim, and whether it is met."""
        if self.aim is None:
            return ""
        rate = self.unit.endswith("/s")
        met = self.found >= self.aim if rate else self.found <= self.aim
        return f"{'at least' if rate else 'at most'} {self.aim:,g} {self.unit}: {'met' if met else 'MISSED'}"


def summary(figures: list[Figure]) -> str:
    """All figures, one a line, each beside its aim."""
    width = max(len(each.what) for each in figures)
    lines = (f"{each.what:<{width}}  {each.found:>10,.0f} {each.unit:<8}  {each.verdict}" for each in figures)
    return "\n".join(line.rstrip() for line in lines)


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


async def timed(what: str, asks: int, pid: int, aim: float, ask: Callable[[], Awaitable[object]]) -> Figure:
    """Ask so many times and print how long the answers took, and what they cost the projector on average."""
    took: list[float] = []
    before = spent(pid)
    for _ in range(asks):
        await clock(took, ask)
    cost = (spent(pid) - before) / asks * 1000
    print(f"{what}: {shares(took)}; processor {cost:.1f} ms", flush=True)
    return Figure(f"{what}, p95", share(took, 95), "ms", aim)


async def clock(took: list[float], ask: Callable[[], Awaitable[object]]) -> None:
    """Ask once, and note the milliseconds."""
    began = time.perf_counter()
    await ask()
    took.append((time.perf_counter() - began) * 1000)


def share(took: list[float], percent: int) -> float:
    """A percentile; nothing comes of nothing."""
    return math.nan if not took else sorted(took)[len(took) * percent // 100]


def shares(took: list[float]) -> str:
    """Median, 95th percentile and maximum of milliseconds."""
    shown = (f"p{percent} {share(took, percent):.1f} ms" for percent in (50, 95))
    return f"{', '.join(shown)}, max {max(took):.1f} ms" if took else "never seen"


async def questions(client: AsyncClient, pid: int, some: list[str], asks: int) -> list[Figure]:
    """The usual ones, in the ways the command line asks them."""
    wire, last = client.wire, {"limit": 20, "fresh": False}
    pick = random.Random(1).choice  # noqa: S311  # some runs
    asked: list[tuple[str, float, Callable[[], Awaitable[object]]]] = [
        ("run list", 20, lambda: wire.call("history", "runs", last, dict)),
        ("a run's events", 15, lambda: wire.call("history", "events", {"run_id": pick(some)}, dict)),
        ("a run's logs", 50, lambda: wire.call("history", "logs", {"run_id": pick(some)}, dict)),
        ("hourly analytics of a day, as SQL", 100, lambda: client.query(_HOURLY)),
    ]
    return [await timed(what, asks, pid, aim, ask) for what, aim, ask in asked]


class Flow(NamedTuple):
    """What comes in steadily: events and bytes of log text, each second; ``aim``: milliseconds of lag, p95."""

    rate: int
    log_rate: int = 0
    aim: float | None = None

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
FLOWS, QUIET = (Flow(5_000, aim=250), Flow(10_000, 10 * 1024**2)), Flow(200)


async def steady(nc: Nats, flow: Flow, seconds: float, *readers: Coroutine[Any, Any, None]) -> list[Figure]:
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
    where = f"at {flow.rate:,} events/s" + (f" and {flow.log_rate / 1024**2:.0f} MB/s of logs" if flow.log_rate else "")
    figures = [Figure(f"came {where}", reached * flow.rate, "events/s", 0.98 * flow.rate)]
    figures += [Figure(f"lag {where}, p95", share(lags[topology.RUNS], 95), "ms", flow.aim)]
    return figures + [Figure("  of the logs, p95", share(lags[topology.LOGS], 95), "ms")] * bool(flow.log_rate)


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


def sandboxes(pid: int) -> int:
    """The same of the processes that run SQL for a projector: of the largest."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(map(memory, map(int, children)), default=0)


async def take_in(nc: Nats, pid: int, began: float, told: int, log_bytes: int) -> Figure:
    """Wait until the projector that was started at ``began`` has the whole log, and print how fast it took that in."""
    await applied(nc)
    seconds, used, megabytes = time.perf_counter() - began, spent(pid), log_bytes / 1024**2
    print(
        f"taken in: {told / seconds:,.0f} events/s and {megabytes / seconds:.1f} MB/s of logs, {seconds:.0f} s in all"
    )
    each = f"{told / used:,.0f} events for each second of it"
    print(f"processor time: {used:.1f} s, {each}; {memory(pid)} MiB", flush=True)
    return Figure("taken in, events and logs at once", told / seconds, "events/s", 40_000)


async def measure(
    nc: Nats, client: AsyncClient, pid: int, some: list[str], options: argparse.Namespace
) -> list[Figure]:
    """Lags at each steady rate, and how fast the questions are answered, beside few events and beside none."""
    figures = []
    for flow in FLOWS:
        figures += await steady(nc, flow, options.seconds, read(client, some), read(client, some))
        await applied(nc)
    took: list[float] = []
    await steady(nc, QUIET, options.seconds, inquire(client, took))
    print(f"  hourly analytics of a day, as SQL: {shares(took)}")
    figures.append(Figure(f"hourly analytics at {QUIET.rate} events/s, p95", share(took, 95), "ms"))
    await applied(nc)
    return figures + await questions(client, pid, some, options.asks)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.05, help="1: ten million events, 5 GB of log text")
    parser.add_argument("--asks", type=int, default=100, help="how often each question is asked")
    parser.add_argument("--seconds", type=float, default=20, help="how long events come at each steady rate")
    options = parser.parse_args()
    runs, log_bytes = round(_RUNS * options.scale), round(_LOG_BYTES * options.scale)
    with tempfile.TemporaryDirectory() as folder:
        history = Path(folder) / "history"
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        async with connected(server.url, name="bench") as nc:
            await ensure_topology(nc)
            began = time.perf_counter()
            told, some = await fill(nc, runs, log_bytes)
            made = f"{runs:,} runs, {told:,} events, {log_bytes / 1024**2:,.0f} MB of log text"
            print(f"{made}; the log was filled in {time.perf_counter() - began:.0f} s", flush=True)
            began = time.perf_counter()
            async with projector(server.url, history, *_HOT) as pid:
                figures = [await take_in(nc, pid, began, told, log_bytes)]
                async with AsyncClient(server.url, project=SCOPE.project, env=SCOPE.environment) as client:
                    figures += await measure(nc, client, pid, some, options)
                files = sum(path.stat().st_size for path in history.rglob("*") if path.is_file())
                figures += [
                    Figure("memory of the projector, at most", memory(pid), "MiB"),
                    Figure("memory of a process for SQL, at most", sandboxes(pid), "MiB"),
                    Figure("files of the history", files / 1024**2, "MB"),
                ]
        await server.stop()
    print(f"\n{made}\n{summary(figures)}")


if __name__ == "__main__":
    asyncio.run(main())
