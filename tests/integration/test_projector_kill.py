"""The projector's process, killed at random moments while it works: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.setup import ensure_topology
from helmr.errors import Conflict, NotFound
from store.home import Home
from store.verify import rebuild, verify
from tests.integration.history import HistoryProcess, publish, publish_log
from tests.lives import lives, record, session

pytestmark = pytest.mark.anyio

#: More of them with HELMR_TEST_KILLS.
KILLS = int(os.environ.get("HELMR_TEST_KILLS", "10"))
#: The moments are the same again with HELMR_TEST_SEED, as far as the machine lets them be.
SEED = int(os.environ.get("HELMR_TEST_SEED", "6"))


@pytest.fixture
async def process(nats_url: str, tmp_path: Path) -> AsyncIterator[HistoryProcess]:
    """A projector's process, not started yet; killed in the end if it still runs."""
    async with HistoryProcess(nats_url, tmp_path / "h") as process:
        yield process


@pytest.fixture
async def log(nc: Nats) -> Nats:
    """A connection to a server that has the streams."""
    await ensure_topology(nc)
    return nc


async def load(nc: Nats, stop: asyncio.Event) -> int:
    """Publish runs, sessions, records and log chunks until told to stop; the number of rounds."""
    rounds = 0
    while not stop.is_set():
        told = lives(16)
        await publish(nc, [message for life in told for message in life.published()])
        await publish(nc, [*session(told[0]), record(told[0].spec.session_id, 1, {"round": rounds})])
        await publish_log(nc, told[0].id, b"line\n" * 200)
        rounds += 1
        await asyncio.sleep(0.02)  # some 4,000 messages a second: a load, but one that can be kept up with
    return rounds


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
async def test_kills_neither_lose_nor_double_a_row(
    log: Nats, nats_url: str, tmp_path: Path, process: HistoryProcess
) -> None:
    moments = random.Random(SEED)  # noqa: S311  # arbitrary moments
    stop = asyncio.Event()
    loading = asyncio.create_task(load(log, stop))
    for _ in range(KILLS):
        await process.start()
        assert "ready" in process.told, process.told
        await asyncio.sleep(moments.uniform(0, 0.6))
        await process.kill()
    stop.set()
    assert await loading > 0
    await process.start()
    await process.caught_up(log)
    assert (await verify(nats_url, tmp_path / "h")).same
    assert await process.stop() == 0
    found = await verify(nats_url, tmp_path / "h")
    assert found.same
    assert found.tables["events"].rows > 0
    assert found.tables["logs"].rows > 0
    assert all(table.aged == 0 for table in found.tables.values())


async def test_a_rebuilt_history_is_the_same(log: Nats, nats_url: str, tmp_path: Path, process: HistoryProcess) -> None:
    home = tmp_path / "h"
    for life in lives(8):
        await publish(log, life.published())
        await publish_log(log, life.id, b"line\n")
    await process.start()
    await process.caught_up(log)
    with pytest.raises(Conflict, match="another process"):
        await rebuild(nats_url, home)
    assert await process.stop() == 0
    made = await rebuild(nats_url, home)
    assert made.runs == 8
    assert made.former is not None
    assert (await verify(nats_url, home)).same


async def test_a_rebuild_does_not_lose_what_only_the_history_knows(
    log: Nats, nats_url: str, tmp_path: Path, process: HistoryProcess
) -> None:
    home = tmp_path / "h"
    first, second = lives(2)
    await publish(log, first.published() + second.published())
    await process.start()
    await process.caught_up(log)
    await process.stop()
    await log.jetstream().purge_stream(topology.RUNS, seq=len(first.events) + 1)
    found = await verify(nats_url, home)
    assert found.same
    assert found.tables["runs"].aged == 1
    with pytest.raises(Conflict, match="has 2 runs, the log only 1"):
        await rebuild(nats_url, home)
    assert not Home(home / "rebuild").root.exists()
    assert (await rebuild(nats_url, home, force=True)).runs == 1


async def test_verify_finds_what_was_tampered_with(
    log: Nats, nats_url: str, tmp_path: Path, process: HistoryProcess
) -> None:
    import duckdb

    home = Home(tmp_path / "h")
    await publish(log, [message for life in lives(8) for message in life.published()])
    await process.start()
    await process.caught_up(log)
    await process.stop()
    with duckdb.connect(str(home.history)) as con:
        con.execute("DELETE FROM events WHERE seq = 2")
        con.execute("UPDATE runs_closed SET status = 'succeeded' WHERE status = 'failed'")
    found = await verify(nats_url, home.root)
    assert not found.same
    assert (found.tables["events"].missing, found.tables["events"].extra) == (1, 0)
    assert found.tables["runs"].missing == found.tables["runs"].extra > 0
    with pytest.raises(NotFound):
        await verify(nats_url, tmp_path / "nowhere")


async def test_the_process_says_why_it_cannot_start(process: HistoryProcess) -> None:
    await process.start()
    assert await process.ended() == 4
    assert "error: stream RUNS: stream not found" in process.told
    assert "Traceback" not in process.told


async def test_the_process_ends_cleanly_under_load(log: Nats, tmp_path: Path, process: HistoryProcess) -> None:
    stop = asyncio.Event()
    loading = asyncio.create_task(load(log, stop))
    await process.start()
    assert await process.stop() == 0
    stop.set()
    await loading
    assert not (tmp_path / "h" / "history.db.wal").exists()
    assert "ERROR" not in process.told
