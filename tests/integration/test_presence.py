"""Who is alive: by heartbeats, by their absence, and in spite of outages."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.presence import Presence, WorkerInfo, announce, withdraw
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr import events, ids

pytestmark = pytest.mark.anyio


def _info(**changes: object) -> WorkerInfo:
    base = WorkerInfo(
        id=ids.new("wrk"),
        host="host_1",
        group="default",
        engine="process",
        isolated=False,
        slots=4,
        running=0,
        started_at=events.now(),
        version="0",
    )
    return msgspec.structs.replace(base, **changes)


class _Clock:
    """Stands in for the module ``time``, which the event loop uses too."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr("bus.presence.time", clock)
    return clock


@asynccontextmanager
async def _watching(nc: Nats) -> AsyncIterator[Presence]:
    view = Presence(nc)
    task = asyncio.create_task(view.watch())
    await asyncio.wait_for(view.ready.wait(), 5)
    try:
        yield view
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _until(view: Presence, worker: str, *, alive: bool) -> None:
    async with asyncio.timeout(10):
        while view.is_alive(worker) != alive:  # noqa: ASYNC110  # presence has no events
            await asyncio.sleep(0.02)


async def test_who_announces_itself_is_seen_until_it_withdraws(nc: Nats) -> None:
    await ensure_topology(nc)
    early, late = _info(), _info()
    await announce(nc, early)
    async with _watching(nc) as view:
        assert view.is_alive(early.id)
        await announce(nc, late)
        await _until(view, late.id, alive=True)
        assert view.alive()[late.id] == late
        await withdraw(nc, late.id)
        await _until(view, late.id, alive=False)
        assert set(view.alive()) == {early.id}


async def test_who_falls_silent_is_gone_after_its_term(nc: Nats, clock: _Clock) -> None:
    await ensure_topology(nc)
    info = _info()
    async with _watching(nc) as view:
        await announce(nc, info)
        await _until(view, info.id, alive=True)
        clock.now += topology.PRESENCE_TTL - 0.01
        assert view.is_alive(info.id)
        clock.now += 0.02
        assert not view.is_alive(info.id)
        await announce(nc, info)
        await _until(view, info.id, alive=True)


async def test_nobody_is_judged_before_there_was_time_to_be_heard(nc: Nats, clock: _Clock) -> None:
    await ensure_topology(nc)
    view = Presence(nc)
    settled = [view.settled]
    clock.now += topology.PRESENCE_TTL + topology.HEARTBEAT + 0.1
    settled.append(view.settled)
    view.forgive()
    settled.append(view.settled)
    assert settled == [False, True, False]


async def test_after_an_outage_everybody_has_a_new_term(nc: Nats, nats_server: EmbeddedServer, clock: _Clock) -> None:
    await ensure_topology(nc)
    keeping = asyncio.create_task(nats_server.supervise())
    info, other = _info(), _info()
    async with _watching(nc) as view:
        await announce(nc, info)
        await _until(view, info.id, alive=True)
        assert nats_server.pid is not None
        os.kill(nats_server.pid, signal.SIGKILL)
        clock.now += topology.PRESENCE_TTL * 2
        await _until(view, info.id, alive=True)
        assert not view.settled
        await announce(nc, other)
        await _until(view, other.id, alive=True)
    await nats_server.stop()
    await keeping
