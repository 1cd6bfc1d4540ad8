"""A worker that is asked to stop: it takes nothing new, lets its runs end, and hands back what does not end in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from tests.integration.platform import Platform, RunningWorker, history, kinds, running, until

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from pathlib import Path
    from helmr import streams, task

    notes = streams.input("notes")

    @task("asks")
    def asks(payload: str) -> str:
        while payload and not Path(payload).exists():
            time.sleep(0.01)
        return notes.wait()

    @task("wait-for-file")
    def wait_for_file(payload: str) -> str:
        print("begun", flush=True)
        while not Path(payload).exists():
            time.sleep(0.01)
        return "ended"
"""


@asynccontextmanager
async def _two_workers(tmp_path: Path, *, drain: float) -> AsyncIterator[tuple[Platform, AsyncClient, RunningWorker]]:
    """A platform with a worker that drains, and another that comes later."""
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        yield platform, helmr, await platform.add_worker(drain=drain)


async def _draining(platform: Platform, worker: RunningWorker) -> None:
    async with asyncio.timeout(10):
        while not platform.control.presence.alive()[worker.id].draining:  # noqa: ASYNC110  # presence has no events
            await asyncio.sleep(0.01)


async def test_what_runs_may_end_and_what_comes_goes_elsewhere(tmp_path: Path) -> None:
    async with _two_workers(tmp_path, drain=60) as (platform, helmr, first):
        gate = tmp_path / "gate"
        old = await helmr.sessions.start("wait-for-file", str(gate))
        await until(helmr, old.run, "started")
        stopping = asyncio.create_task(platform.stop_worker(first))
        await _draining(platform, first)
        second = await platform.add_worker()
        new = await helmr.sessions.start("wait-for-file", str(gate))
        assert (await until(helmr, new.run, "leased")).data["worker"] == second.id
        gate.touch()
        await stopping
        assert not platform.control.presence.is_alive(first.id)
        for each in (old, new):
            run = await each.run.wait(timeout=20)
            assert (run.output, run.dispatch_attempt) == ("ended", 1)


async def test_what_waits_is_parked_before_its_time_and_goes_on_elsewhere(tmp_path: Path) -> None:
    async with _two_workers(tmp_path, drain=3600) as (platform, helmr, first):
        gate = tmp_path / "gate"
        kept, busy = [await helmr.sessions.start("asks", payload) for payload in ("", str(gate))]
        await until(helmr, kept.run, "waiting")
        await until(helmr, busy.run, "started")
        stopping = asyncio.create_task(platform.stop_worker(first))
        await _draining(platform, first)
        second = await platform.add_worker()
        await helmr.sessions.open(kept.session).input("notes").send("one")
        assert await kept.run.result(timeout=60) == "one"
        assert not stopping.done()
        gate.touch()  # the other begins to wait on a worker that keeps nothing any more
        await until(helmr, busy.run, "waiting")
        await stopping
        await helmr.sessions.open(busy.session).input("notes").send("two")
        assert await busy.run.result(timeout=60) == "two"
        for run in (kept.run, busy.run):
            leases = [event.data["worker"] for event in await history(helmr, run) if event.kind == "leased"]
            assert leases == [first.id, second.id]
            assert (await kinds(helmr, run)).count("started") == 2


@pytest.mark.parametrize("hurried", [False, True])
async def test_what_does_not_end_in_time_is_handed_back(tmp_path: Path, *, hurried: bool) -> None:
    async with _two_workers(tmp_path, drain=3600 if hurried else 0.2) as (platform, helmr, first):
        started = await helmr.sessions.start("wait-for-file", str(tmp_path / "gate"))
        await until(helmr, started.run, "started")
        stopping = asyncio.create_task(platform.stop_worker(first))
        if hurried:
            await _draining(platform, first)
            first.hurry.set()
        await stopping
        assert await kinds(helmr, started.run) == ["queued", "leased", "started", "lease_lost", "queued"]
        second = await platform.add_worker()
        assert (await until(helmr, started.run, "leased", count=2)).data["worker"] == second.id
        (tmp_path / "gate").touch()
        assert (await started.run.wait(timeout=20)).output == "ended"


async def test_an_idle_worker_stops_at_once(tmp_path: Path) -> None:
    async with _two_workers(tmp_path, drain=3600) as (platform, _, first), asyncio.timeout(20):
        await platform.stop_worker(first)
