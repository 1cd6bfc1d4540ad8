"""Runs of workers that are gone, when no other worker is there to find them: control takes them back by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from bus import topology
from bus.log import RUN
from bus.queueing import redispatch
from helmr import events, ids, subjects
from helmr.client import AsyncClient, RunHandle
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.integration.parts import worker
from tests.integration.platform import Platform, kinds, running, state_of, until

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from helmr import task

    @task("sleep")
    def sleep():
        time.sleep(120)

    @task("once", on_worker_lost="fail")
    def once():
        time.sleep(120)
"""


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    """One without workers."""
    async with running(tmp_path, workers=0) as platform:
        yield platform


@pytest.fixture
async def helmr(platform: Platform) -> AsyncClient:
    return await platform.project("acme", TASKS)


async def _lease(platform: Platform, helmr: AsyncClient, run: RunHandle) -> str:
    """Lease a queued run for a worker that nobody has ever heard of."""
    phantom = ids.new("wrk")
    await platform.control.log.transact(
        RUN, Scope(*helmr.scope), run.id, lambda state: rules.lease(state, worker=phantom, dispatch=state.dispatch or 0)
    )
    return phantom


async def test_a_run_is_queued_anew_though_nobody_pulls(platform: Platform, helmr: AsyncClient, tmp_path: Path) -> None:
    async with worker(platform.server.url, tmp_path) as only:
        started = await helmr.sessions.start("sleep")
        began = await until(helmr, started.run, "started")
        await only.kill()
        again = await until(helmr, started.run, "queued", count=2)
    assert await kinds(helmr, started.run) == ["queued", "leased", "started", "lease_lost", "queued"]
    assert (again.attempt, again.dispatch_attempt, again.data["cause"]) == (1, 1, "redispatch")
    assert (again.at - began.at).total_seconds() < topology.ACK_WAIT
    names = [info.name for info in await platform.nc.jetstream().consumers_info("RUNS")]
    assert topology.lane_consumer_name(f"@{only.name}") not in names


async def test_after_five_lost_workers_it_fails_though_nobody_pulls(platform: Platform, helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("sleep")
    for number in range(1, rules.MAX_DISPATCH_ATTEMPTS + 1):
        await until(helmr, started.run, "queued", count=number)
        await _lease(platform, helmr, started.run)
    run = await started.run.wait(timeout=30)
    assert run.failure is not None
    assert (run.failure.code, run.attempt, run.dispatch_attempt) == ("dispatch_exhausted", 1, 5)
    assert (await kinds(helmr, run))[-4:] == ["lease_lost", "queued", "leased", "failed"]


async def test_a_task_that_must_not_begin_twice_fails(platform: Platform, helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("once")
    phantom = await _lease(platform, helmr, started.run)
    run = await started.run.wait(timeout=30)
    assert run.failure is not None
    assert run.failure.code == "worker_lost"
    assert phantom in run.failure.message


async def test_a_cancel_that_the_worker_did_not_live_to_hear_is_carried_out(
    platform: Platform, helmr: AsyncClient
) -> None:
    started = await helmr.sessions.start("sleep")
    await _lease(platform, helmr, started.run)
    assert (await started.run.cancel(reason="enough")).status == "running"
    assert (await started.run.wait(timeout=30)).status == "cancelled"
    assert await kinds(helmr, started.run) == ["queued", "leased", "cancel_requested", "cancelled"]


async def test_a_run_in_the_lane_of_a_worker_that_is_gone_is_moved(platform: Platform, helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("sleep")
    scope, phantom = Scope(*helmr.scope), ids.new("wrk")
    await redispatch(platform.control.log, scope, started.run.id, dispatch=1, lane=f"@{phantom}")
    await until(helmr, started.run, "queued", count=3)
    assert (await state_of(platform, helmr, started.run)).lane == "default"


async def test_a_worker_that_answers_keeps_its_runs_though_nobody_hears_its_announcements(
    platform: Platform, helmr: AsyncClient
) -> None:
    theirs, lost = [await helmr.sessions.start("sleep") for _ in range(2)]
    there = await _lease(platform, helmr, theirs.run)

    async def answer(msg: Msg) -> None:
        await msg.respond(b"")

    listening = await platform.nc.subscribe(subjects.worker(there, "ping"), cb=answer)
    await _lease(platform, helmr, lost.run)
    await until(helmr, lost.run, "queued", count=2)
    assert await kinds(helmr, theirs.run) == ["queued", "leased"]
    silent_since = events.now()
    await listening.unsubscribe()
    taken = await until(helmr, theirs.run, "lease_lost")
    assert taken.at > silent_since
