"""What has ended and is in the history leaves the log; what is of use, or not in the history yet, stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus import topology, watermark
from bus.log import RUN, SESSION
from bus.watermark import Watermark
from helmr import events
from helmr.client import AsyncClient
from helmr.errors import NotFound
from helmr.reducers import session as rules
from helmr.subjects import Scope
from tests.integration.platform import Platform, running, until

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from helmr import metadata, streams, task

    report = streams.output("report")

    @task("talk")
    def talk(payload) -> str:
        metadata.set("phase", "talking")
        report.append({"n": 1})
        return payload

    @task("sleep")
    def sleep():
        time.sleep(120)
"""


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    """One that keeps nothing longer than it must."""
    async with running(tmp_path, retention=0) as platform:
        yield platform


@pytest.fixture
async def helmr(platform: Platform) -> AsyncClient:
    return await platform.project("acme", TASKS)


async def _file_everything(platform: Platform) -> None:
    """Say what a projector would say that has seen all there will ever be."""
    streams = {topology.RUNS: 10**9, topology.SESSIONS: 10**9}
    await watermark.publish(platform.nc, Watermark(streams=streams, at=events.now()))


async def _subjects(platform: Platform, stream: str = topology.RUNS, under: str = ">") -> dict[str, int]:
    """How many messages each subject has."""
    info = await platform.nc.jetstream().stream_info(stream, subjects_filter=under)
    return info.state.subjects or {}


async def _settle(platform: Platform, *, in_hand: int) -> None:
    """Until the janitor has looked at every end, and has put back so many."""
    async with asyncio.timeout(20):
        while True:
            info = await platform.nc.jetstream().consumer_info(topology.RUNS, "janitor")
            if (info.num_pending, info.num_ack_pending) == (0, in_hand):
                return
            await asyncio.sleep(0.05)


async def test_a_session_that_has_ended_leaves_nothing(platform: Platform, helmr: AsyncClient) -> None:
    await _file_everything(platform)
    started = await helmr.sessions.start("talk", "x", external_id="one", ttl="1h", expires_in="1h")
    assert (await started.run.wait(timeout=20)).status == "succeeded"
    await _settle(platform, in_hand=0)
    assert {
        subject.split(".")[6] for subject in await _subjects(platform, under=f"helmr.ev.*.*.run.{started.run.id}.>")
    } == {
        "queued",
        "succeeded",
    }, "the latest run keeps its ends"
    run = await helmr.runs.get(started.run)
    assert (run.status, run.payload, run.output) == ("succeeded", "x", "x")
    again = await helmr.sessions.start("talk", "x", external_id="one", ttl="1h", expires_in="1h")
    assert (again.reused, again.run.id) == (True, started.run.id)
    await helmr.sessions.close(started.session)
    await _settle(platform, in_hand=0)
    assert [s for s in await _subjects(platform) if started.session.id in s or started.run.id in s] == []
    assert await _subjects(platform, topology.SESSIONS) == {}
    with pytest.raises(NotFound):
        await platform.control.log.present(RUN, Scope(*helmr.scope), started.run.id)
    anew = await helmr.sessions.start("talk", "y", external_id="one")
    assert (anew.reused, (await anew.run.wait(timeout=20)).output) == (False, "y")


async def test_what_the_history_has_not_got_stays(platform: Platform, helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("talk", "x")
    await started.run.wait(timeout=20)
    await helmr.sessions.close(started.session)
    await _settle(platform, in_hand=2)
    kinds = [event.kind for event in await helmr.runs.events.list(started.run)]
    assert kinds == ["queued", "leased", "started", "metadata", "output", "succeeded"]
    assert len(await _subjects(platform, topology.SESSIONS)) == 1


async def test_what_lives_stays(platform: Platform, helmr: AsyncClient) -> None:
    await _file_everything(platform)
    started = await helmr.sessions.start("sleep")
    await until(helmr, started.run, "started")
    scope = Scope(*helmr.scope)
    await platform.control.log.transact(SESSION, scope, started.session.id, lambda s: rules.cancel(s, reason=None))
    await _settle(platform, in_hand=1)
    assert [event.kind for event in await helmr.runs.events.list(started.run)] == ["queued", "leased", "started"]
    assert (await helmr.sessions.get(started.session)).status == "cancelled"
    await started.run.cancel(force=True)


async def test_what_is_young_stays(tmp_path: Path) -> None:
    async with running(tmp_path, retention=3600) as platform:
        helmr = await platform.project("acme", TASKS)
        await _file_everything(platform)
        started = await helmr.sessions.start("talk", "x")
        await started.run.wait(timeout=20)
        await _settle(platform, in_hand=1)
        assert len(await helmr.runs.events.list(started.run)) == 6
