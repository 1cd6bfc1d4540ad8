"""The projector's process, killed at random moments while it works: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.setup import ensure_topology
from helmr.errors import Conflict, NotFound, Unavailable
from store.home import Home
from store.transfer import export
from store.verify import rebuild, verify
from tests.integration.history import HistoryProcess, projecting, publish, publish_log
from tests.kills import kill_again_and_again, load
from tests.lives import lives

pytestmark = pytest.mark.anyio

#: More of them with HELMR_TEST_KILLS.
KILLS = int(os.environ.get("HELMR_TEST_KILLS", "5"))
#: The moments are the same again with HELMR_TEST_SEED, as far as the machine lets them be.
_PARTS = {"history.db", "history.lock", "logs", "archive", "snapshots", "tmp"}
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


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
async def test_kills_neither_lose_nor_double_a_row(
    log: Nats, nats_url: str, tmp_path: Path, process: HistoryProcess
) -> None:
    toll = await kill_again_and_again(process, log, KILLS, SEED, rate=300)
    assert toll.kills == KILLS
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


@pytest.mark.parametrize("small_disk", ["12m"], indirect=True)
async def test_a_full_disk_is_named_and_costs_nothing(
    log: Nats, nats_url: str, small_disk: Path, tmp_path: Path
) -> None:
    home = Home(small_disk / "h")
    for life in lives(8):
        await publish(log, life.published())
        await publish_log(log, life.id, b"line\n")
    async with projecting(log, home.root) as projector:
        await projector.fresh(logs=True)
    before = home.history.read_bytes()
    for room in (0, 700 * 1024):  # what is written fits, at last, but not into the files themselves
        (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        for what in (verify, rebuild):
            with pytest.raises(Unavailable, match=r"the disk is full: .*No space left") as told:
                await what(nats_url, home.root)
            assert (told.value.hint or "").startswith(f"make room on the disk of {home.root}")
        with pytest.raises(Unavailable, match="the disk is full: "):
            await export(home.root, tmp_path / "export.tar")
        (small_disk / "rest").unlink()
        assert home.history.read_bytes() == before
        assert {path.name for path in home.root.iterdir()} <= _PARTS
    assert (await verify(nats_url, home.root)).same
    assert (await rebuild(nats_url, home.root)).runs == 8


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
    loading = asyncio.create_task(load(log, stop, 2000))
    await process.start()
    assert await process.stop() == 0
    stop.set()
    await loading
    assert not (tmp_path / "h" / "history.db.wal").exists()
    assert "ERROR" not in process.told
