"""Kills the projector's process again and again while it works and archives: for the test, and for ``bench/kills.py``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import nats.errors
from nats.aio.client import Client as Nats

from bus import topology
from helmr.errors import Unavailable
from store.home import Home
from store.verify import watermarks
from tests.integration.history import HistoryProcess, ask, publish, publish_log
from tests.lives import lives, record, session

#: Seconds after its first transaction within which the process is killed, and how long that one may take to come.
_LIFE, _PATIENCE = 0.6, 60.0
#: Of so many kills one waits for the archive to be writing a file, and one for nothing: it may come before any transaction.
_AIMED, _BLIND = 4, 5
#: Days over which events are spread, all of them closed: the process archives what it finds when it starts.
_DAYS = 30
#: Messages of one round of load, some; rounds follow one another as fast as makes the wanted rate.
_ROUND = 75


@dataclass
class Toll:
    """Kills with progress before them; those without, which do not count; and how many left a file half-written."""

    kills: int = 0
    idle: int = 0
    archiving: int = 0


async def load(nc: Nats, stop: asyncio.Event, rate: int) -> int:
    """Publish so many messages a second (runs, sessions, records, log chunks) until told to stop; the number of rounds."""
    rounds = 0
    while not stop.is_set():
        told = lives(16, start=datetime.now(UTC) - timedelta(days=40 - rounds % _DAYS))
        await publish(nc, [message for life in told for message in life.published()])
        await publish(nc, [*session(told[0]), record(told[0].spec.session_id, 1, {"round": rounds})])
        await publish_log(nc, told[0].id, b"line\n" * 200)
        rounds += 1
        await asyncio.sleep(_ROUND / rate)
    return rounds


async def kill_again_and_again(
    process: HistoryProcess,
    nc: Nats,
    kills: int,
    seed: int,
    *,
    rate: int,
    tell: Callable[[Toll], None] = lambda _: None,
) -> Toll:
    """Kill the process so many times, each time after it has applied something that the one before had not.

    Raises:
        AssertionError: it did not start, or makes no progress.
    """
    moments, home, toll = random.Random(seed), Home(process.home), Toll()  # noqa: S311  # arbitrary moments
    stop, applied, rounds = asyncio.Event(), 0, 0
    loading = asyncio.create_task(load(nc, stop, rate))
    try:
        while toll.kills < kills:
            rounds += 1
            await process.start()
            assert "ready" in process.told, process.told
            if rounds % _BLIND:
                await _beyond(nc, applied)
            await _moment(home, moments, aimed=rounds % _AIMED == 0)
            await process.kill()
            before, applied = applied, (await asyncio.to_thread(watermarks, home))[topology.RUNS]
            if applied > before:
                toll.kills += 1
                toll.archiving += any(home.archive.glob("*.part"))
                tell(toll)
            else:
                toll.idle += 1
                assert toll.idle <= 10 + kills, "it makes no progress"
    finally:
        stop.set()
        await loading
    return toll


async def _beyond(nc: Nats, applied: int) -> None:
    """Wait until the process has applied more of RUNS than that."""
    async with asyncio.timeout(_PATIENCE):
        while await _applied(nc) <= applied:  # noqa: ASYNC110  # another process does not tell
            await asyncio.sleep(0.02)


async def _applied(nc: Nats) -> int:
    try:
        answer = await ask(nc, "status", {})
    except (nats.errors.NoRespondersError, nats.errors.TimeoutError, Unavailable):
        return -1  # the server gave the question to the one that was killed, or the machine is busy
    return int(answer["streams"][topology.RUNS]["applied"])


async def _moment(home: Home, moments: random.Random, *, aimed: bool) -> None:
    """Wait for the moment to kill: any, or when a file of the archive is being written."""
    until = asyncio.get_running_loop().time() + moments.uniform(0, _LIFE)
    while asyncio.get_running_loop().time() < until:
        if aimed and any(home.archive.glob("*.part")):
            return
        await asyncio.sleep(0.001)
