"""From the queue to a worker: one lease per message, stale messages, and workers that fail in the middle of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from bus.log import RUN
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.integration.platform import Platform, history, kinds, running, until, written
from worker.conversation import Conversation

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from helmr import task

    @task("quick")
    def quick() -> int:
        return 1

    @task("sleep")
    def sleep(payload: dict):
        print("begun", flush=True)
        time.sleep(payload["seconds"])

    @task("once", on_worker_lost="fail")
    def once():
        print("begun", flush=True)
        time.sleep(30)
"""


async def _lanes(platform: Platform) -> dict[str, tuple[int, int]]:
    """For every lane: messages not yet delivered, and those delivered and not yet settled."""
    infos = await platform.nc.jetstream().consumers_info("RUNS")
    return {
        info.name: (info.num_pending or 0, info.num_ack_pending or 0) for info in infos if info.name.startswith("lane-")
    }


async def _settled(platform: Platform) -> None:
    async with asyncio.timeout(10):
        while any(  # noqa: ASYNC110  # the server has no event for it
            any(counts) for counts in (await _lanes(platform)).values()
        ):
            await asyncio.sleep(0.05)


async def test_every_message_is_settled_when_its_run_has_ended(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2, slots=2) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await asyncio.gather(*(helmr.sessions.start("quick") for _ in range(12)))
        for each in started:
            assert (await each.run.wait(timeout=30)).output == 1
            assert await kinds(helmr, each.run) == ["queued", "leased", "started", "succeeded"]
        await _settled(platform)
        workers = {(await history(helmr, each.run))[1].data["worker"] for each in started}
        assert workers == {worker.id for worker in platform.workers}


async def test_a_run_on_a_live_workspace_goes_to_its_worker(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2) as platform:
        helmr = await platform.project("acme", TASKS)
        first = await (await helmr.sessions.start("quick")).run.wait(timeout=30)
        live = (await helmr.workspaces.get(first.workspace_id)).worker
        for _ in range(6):
            again = await (await helmr.sessions.start("quick", workspace=first.workspace_id)).run.wait(timeout=30)
            queued, leased = (await history(helmr, again))[:2]
            assert queued.data["lane"] == f"@{live}"
            assert leased.data["worker"] == live


async def test_two_workers_that_race_for_one_workspace_make_one_claim(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2) as platform:
        helmr = await platform.project("acme", TASKS)
        first = await (await helmr.sessions.start("quick")).run.wait(timeout=30)
        for _ in range(5):
            await helmr.workspaces.stop(first.workspace_id)
            started = await asyncio.gather(
                *(helmr.sessions.start("quick", workspace=first.workspace_id) for _ in range(6))
            )
            runs = await asyncio.gather(*(each.run.wait(timeout=30) for each in started))
            assert {run.status for run in runs} == {"succeeded"}
            lasts = [await history(helmr, run) for run in runs]
            executed_by = {[e for e in events if e.kind == "leased"][-1].data["worker"] for events in lasts}
            assert executed_by == {(await helmr.workspaces.get(first.workspace_id)).worker}


async def test_a_stale_message_is_settled_without_a_word(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("quick")
        await platform.control.log.transact(
            RUN,
            Scope(*helmr.scope),
            started.run.id,
            lambda s: rules.requeue(s, cause="redispatch", lane="default"),
        )
        await platform.add_worker()
        await started.run.wait(timeout=30)
        await _settled(platform)
        assert await kinds(helmr, started.run) == ["queued", "queued", "leased", "started", "succeeded"]


async def test_more_runs_than_slots_wait_for_their_turn(tmp_path: Path) -> None:
    async with running(tmp_path, slots=2) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await asyncio.gather(*(helmr.sessions.start("sleep", {"seconds": 0.2}) for _ in range(8)))
        runs = await asyncio.gather(*(each.run.wait(timeout=30) for each in started))
        spans = [(run.started_at, run.finished_at) for run in runs]
        for begin, _ in spans:
            assert begin is not None
            assert sum(1 for b, e in spans if b and e and b <= begin < e) <= 2


async def test_a_stopping_worker_hands_back_what_it_executes(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        first = platform.workers[0]
        started = await helmr.sessions.start("sleep", {"seconds": 3})
        await anext(aiter(started.run.logs()))
        await platform.stop_worker(first)
        events = await history(helmr, started.run)
        assert [event.kind for event in events][-2:] == ["lease_lost", "queued"]
        assert (events[-1].data["cause"], events[-1].attempt, events[-1].dispatch_attempt) == ("redispatch", 1, 1)
        second = await platform.add_worker()
        again = await until(helmr, started.run, "leased", count=2)
        assert (again.data["worker"], again.attempt, again.dispatch_attempt) == (second.id, 1, 2)
        run = await started.run.wait(timeout=30)
        assert run.status == "succeeded"
        assert (await written(helmr, run))["stdout"] == b"begun\nbegun\n"
        await _settled(platform)


async def test_a_run_that_was_to_be_cancelled_is_not_handed_on(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project(
            "acme",
            TASKS.replace("time.sleep(payload", "import signal; signal.signal(15, signal.SIG_IGN); time.sleep(payload"),
        )
        started = await helmr.sessions.start("sleep", {"seconds": 30})
        await until(helmr, started.run, "started")
        await started.run.cancel(reason="enough")
        await platform.stop_worker(platform.workers[0])
        run = await helmr.runs.get(started.run)
        assert run.status == "cancelled"


async def test_a_task_that_must_not_begin_twice_fails_when_its_worker_stops(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("once")
        await until(helmr, started.run, "started")
        await platform.stop_worker(platform.workers[0])
        run = await helmr.runs.get(started.run)
        assert run.failure is not None
        assert run.failure.code == "worker_lost"


async def test_a_lost_machine_costs_a_dispatch_and_no_attempt(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("sleep", {"seconds": 1})
        await until(helmr, started.run, "started")
        machine = next(iter(platform.workers[0].worker.machines._entries.values())).machine
        assert machine is not None
        os.kill(int(machine.ref), 9)
        run = await started.run.wait(timeout=30)
        assert (run.status, run.attempt, run.dispatch_attempt) == ("succeeded", 1, 2)
        events = await history(helmr, run)
        lost = next(event for event in events if event.kind == "lease_lost")
        assert "its machine was lost" in lost.data["reason"]
        chunks = [chunk async for chunk in helmr.runs.logs(run)]
        assert {chunk.tombstone for chunk in chunks} == {None, "worker_lost"}


async def test_a_worker_that_fails_on_a_run_gives_up_after_five_dispatches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Conversation, "_act", broken)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("sleep", {"seconds": 30})
        run = await started.run.wait(timeout=30)
        assert run.failure is not None
        assert (run.failure.code, run.dispatch_attempt) == ("dispatch_exhausted", 5)
        lost = [event for event in await history(helmr, run) if event.kind == "lease_lost"]
        assert len(lost) == 4  # the fifth is the end
        assert all("a bug of ours" in event.data["reason"] for event in lost)
        await _settled(platform)


async def test_priorities_share_a_lane(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await asyncio.gather(*(helmr.sessions.start("quick", priority=n) for n in (-5, 0, 7)))
        runs = await asyncio.gather(*(each.run.wait(timeout=30) for each in started))
        assert [run.priority for run in runs] == [-5, 0, 7]
