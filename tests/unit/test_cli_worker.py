"""How ``helmr worker`` ends: in order when asked, quicker when asked again, and with an error when its connection is gone."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cli.process import Stop
from cli.worker import _work
from worker.engine import EngineInfo
from worker.worker import Worker

pytestmark = pytest.mark.anyio

INFO = EngineInfo(name="process", version="3", host="h", isolated=True)


class FakeWorker:
    """Works until it is told to end; never ends by itself when ``stuck``."""

    id = "wrk_1"
    group = "default"

    def __init__(self, *, stuck: bool = False) -> None:
        self.stuck = stuck
        self.closed = self.hurried = False
        self.drain = 0.0
        self.engine = self
        self.slots = type("Slots", (), {"total": 1})

    async def run(self, end: asyncio.Event, ready: asyncio.Event, *, drain: float, hurry: asyncio.Event) -> None:
        ready.set()
        await end.wait()
        self.drain = drain
        await hurry.wait()
        self.hurried = True
        if self.stuck:
            await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True


async def work(worker: FakeWorker, *events: str) -> bool:
    """Have the worker work, and these events happen one after the other."""
    stop, lost = Stop(), asyncio.Event()
    known: dict[str, Any] = {"asked": stop.asked, "hurried": stop.hurried, "lost": lost, "insisted": stop.insisted}
    working = asyncio.create_task(_work(cast("Worker", worker), INFO, stop, lost, drain=7.0, as_json=False))
    for name in events:
        await asyncio.sleep(0.01)
        known[name].set()
    async with asyncio.timeout(5):
        return await working


async def test_a_worker_that_is_asked_to_stop_ends_in_order_and_hurries_when_asked_again() -> None:
    worker = FakeWorker()
    assert await work(worker, "asked", "hurried") is False
    assert (worker.drain, worker.hurried) == (7.0, True)
    assert not worker.closed  # the worker itself has seen to its engine


async def test_a_third_signal_ends_the_machines_at_once() -> None:
    worker = FakeWorker(stuck=True)
    assert await work(worker, "asked", "hurried", "insisted") is False
    assert worker.closed


async def test_a_worker_whose_connection_is_gone_for_good_ends_its_machines_and_says_so() -> None:
    worker = FakeWorker()
    assert await work(worker, "lost") is True
    assert worker.closed
