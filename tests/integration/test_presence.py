"""Who is alive: by heartbeats, by their absence, and in spite of outages."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.attention import MAX_STEP, TICK
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
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, view: Presence, seconds: float) -> None:
        """Let time pass while the view looks on."""
        while seconds > 0:
            self.now += min(seconds, TICK)
            seconds -= TICK
            view.alive()


@asynccontextmanager
async def _watching(nc: Nats, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[Presence]:
    view = Presence(nc, clock=clock)
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


async def test_who_falls_silent_is_gone_after_its_term(nc: Nats) -> None:
    await ensure_topology(nc)
    info, clock = _info(), _Clock()
    async with _watching(nc, clock) as view:
        await announce(nc, info)
        await _until(view, info.id, alive=True)
        clock.pass_by(view, topology.PRESENCE_TTL - 0.01)
        assert view.is_alive(info.id)
        clock.pass_by(view, 0.02)
        assert not view.is_alive(info.id)
        await announce(nc, info)
        await _until(view, info.id, alive=True)


async def test_who_slept_calls_nobody_silent(nc: Nats) -> None:
    await ensure_topology(nc)
    info, clock = _info(), _Clock()
    async with _watching(nc, clock) as view:
        await announce(nc, info)
        await _until(view, info.id, alive=True)
        clock.pass_by(view, topology.PRESENCE_TTL - MAX_STEP - 0.1)
        clock.now += 3600
        assert view.is_alive(info.id), "an hour of sleep is one step of attention"
        clock.pass_by(view, 0.2)
        assert not view.is_alive(info.id)


async def test_what_is_taken_for_gone_is_looked_up_first(nc: Nats) -> None:
    await ensure_topology(nc)
    here, gone = _info(), _info()
    view = Presence(nc)
    await announce(nc, here)
    assert not view.is_alive(here.id), "nobody watches"
    assert [await view.confirm_gone(here.id), await view.confirm_gone(gone.id)] == [False, True]
    assert view.is_alive(here.id)
    await withdraw(nc, gone.id)
    assert await view.confirm_gone(gone.id)


async def test_nobody_is_judged_before_there_was_time_to_be_heard(nc: Nats) -> None:
    clock = _Clock()
    view = Presence(nc, clock=clock)
    settled = [view.settled]
    clock.pass_by(view, topology.PRESENCE_TTL + topology.HEARTBEAT + 0.1)
    settled.append(view.settled)
    view.forgive()
    settled.append(view.settled)
    assert settled == [False, True, False]


async def test_after_an_outage_everybody_has_a_new_term(nc: Nats, nats_server: EmbeddedServer) -> None:
    await ensure_topology(nc)
    keeping = asyncio.create_task(nats_server.supervise())
    info, other, clock = _info(), _info(), _Clock()
    async with _watching(nc, clock) as view:
        await announce(nc, info)
        await _until(view, info.id, alive=True)
        assert nats_server.pid is not None
        os.kill(nats_server.pid, signal.SIGKILL)
        clock.pass_by(view, topology.PRESENCE_TTL * 2)
        await _until(view, info.id, alive=True)
        assert not view.settled
        await announce(nc, other)
        await _until(view, other.id, alive=True)
    await nats_server.stop()
    await keeping
