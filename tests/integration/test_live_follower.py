"""The live runs follow the log: over restarts of the server, and from a checkpoint without reading what has ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus import live_follower, topology
from bus.live import LiveRuns
from bus.live_follower import Checkpoint, LiveFollower
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from tests.lives import Life, lives

pytestmark = pytest.mark.anyio


async def publish(nc: Nats, told: Iterable[Life]) -> None:
    js = nc.jetstream()
    for life in told:
        for subject, body in life.published():
            await js.publish(subject, body)


@asynccontextmanager
async def following(nc: Nats) -> AsyncIterator[LiveFollower]:
    follower = LiveFollower(nc, LiveRuns())
    task = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(20):
            await follower.ready.wait()
        yield follower
    finally:
        task.cancel()
        await asyncio.wait({task})


async def holds(follower: LiveFollower, told: Iterable[Life]) -> None:
    """Return once the live runs are those of ``told`` that have not ended."""
    alive = {life.id for life in told if life.state and not life.state.terminal}
    changed = asyncio.Event()
    follower.runs.listen(lambda *_: changed.set())
    async with asyncio.timeout(20):
        while {run.id for run in follower.runs} != alive:
            changed.clear()
            await changed.wait()


async def test_it_is_ready_over_an_empty_log_and_hears_what_comes(nc: Nats) -> None:
    await ensure_topology(nc)
    told = lives(16)
    async with following(nc) as follower:
        assert len(follower.runs) == 0
        await publish(nc, told)
        await holds(follower, told)


async def test_it_is_ready_when_it_knows_what_is_stored(nc: Nats) -> None:
    await ensure_topology(nc)
    told = lives(40)
    await publish(nc, told)
    async with following(nc) as follower:
        assert {run.id for run in follower.runs} == {life.id for life in told if life.state and not life.state.terminal}


async def test_it_goes_on_after_the_server_was_killed(nc: Nats, nats_server: EmbeddedServer) -> None:
    await ensure_topology(nc)
    keeping = asyncio.create_task(nats_server.supervise())
    told = lives(16)
    async with following(nc) as follower:
        await publish(nc, told[:8])
        await holds(follower, told[:8])
        assert nats_server.pid is not None
        os.kill(nats_server.pid, signal.SIGKILL)
        while True:
            try:
                await publish(nc, told[8:])
                break
            except Exception:  # noqa: BLE001  # away; a life told twice is the same life
                await asyncio.sleep(0.1)
        await holds(follower, told)
    await nats_server.stop()
    await keeping


async def test_a_checkpoint_spares_reading_what_has_ended(nc: Nats) -> None:
    await ensure_topology(nc)
    told = lives(80)
    await publish(nc, told)
    async with following(nc) as follower:
        expected = {run.id: run for run in follower.runs}
        await follower.save(await created(nc))
    js = nc.jetstream()
    kept = {run.seq for run in expected.values()}
    for seq in range(1, follower.runs.position + 1):
        if seq not in kept:
            await js.delete_msg(topology.RUNS, seq)
    late = Life().queued()
    await publish(nc, [late])
    async with following(nc) as again:
        assert {run.id: run for run in again.runs} == expected | {late.id: again.runs.get(late.id)}


@pytest.mark.parametrize(
    "value",
    [
        b"nonsense",
        msgspec.json.encode(Checkpoint(created="2020-01-01T00:00:00Z", position=1, named=[])),
        msgspec.json.encode(Checkpoint(created=None, position=10**6, named=[])),
    ],
    ids=["unreadable", "of another log", "beyond the log's end"],
)
async def test_a_checkpoint_that_does_not_fit_is_left_alone(nc: Nats, value: bytes) -> None:
    await ensure_topology(nc)
    await (await nc.jetstream().key_value(topology.CHECKPOINTS_BUCKET)).put("live", value)
    told = lives(8)
    await publish(nc, told)
    async with following(nc) as follower:
        await holds(follower, told)


async def test_a_run_that_is_named_and_was_deleted_has_ended(nc: Nats) -> None:
    await ensure_topology(nc)
    told = [Life().queued(), Life().queued()]
    await publish(nc, told)
    async with following(nc) as follower:
        await holds(follower, told)
        await follower.save(await created(nc))
    await nc.jetstream().delete_msg(topology.RUNS, 1)
    async with following(nc) as again:
        assert {run.id for run in again.runs} == {told[1].id}
        assert again.runs.position == 2


async def test_checkpoints_are_written_by_and_by(nc: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_follower, "_SAVE_EVERY", 0.05)
    monkeypatch.setattr(live_follower, "_WORTH_SAVING", 10)
    await ensure_topology(nc)
    told = lives(16)
    async with following(nc) as follower:
        bucket = await nc.jetstream().key_value(topology.CHECKPOINTS_BUCKET)
        written = await bucket.watchall()
        await publish(nc, told)
        async with asyncio.timeout(20):
            while True:
                entry = await written.updates(timeout=20)
                if entry is not None and entry.value:
                    break
        point = msgspec.json.decode(entry.value, type=Checkpoint)
        assert point.created == await created(nc)
        assert 10 <= point.position <= follower.runs.position
        await written.stop()


async def created(nc: Nats) -> str:
    """When the stream was made, as the server says it."""
    reply = await nc.request(f"$JS.API.STREAM.INFO.{topology.RUNS}", b"")
    return str(msgspec.json.decode(reply.data)["created"])
