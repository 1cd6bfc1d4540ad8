"""Workers that die, sleep and come back: somebody else finishes the run, once."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bus import topology
from bus.leases import lose_lease
from bus.queueing import redispatch
from bus.server import EmbeddedServer
from helmr.client import AsyncClient
from helmr.subjects import Scope
from tests.chaos.machines import Processes
from tests.chaos.proxy import proxied
from tests.integration.parts import part, worker
from tests.integration.platform import Platform, history, running, until, write_project

pytestmark = pytest.mark.anyio

TASKS = """
    import os, time
    from pathlib import Path
    from helmr import task

    def _count() -> int:
        counter = Path("count")
        seen = int(counter.read_text()) + 1 if counter.exists() else 1
        counter.write_text(str(seen))
        return seen

    @task("once-long")
    def once_long() -> int:
        seen = _count()
        print("begun", seen, os.getpid(), flush=True)
        if seen == 1:
            time.sleep(120)
        return seen

    @task("opted-out", on_worker_lost="fail")
    def opted_out():
        print("begun", flush=True)
        time.sleep(120)

    @task("lingers")
    def lingers() -> str:
        trace = Path("trace")
        with trace.open("a") as file:
            file.write("begin ")
        try:
            time.sleep(1)
        finally:
            time.sleep(0.5)
            with trace.open("a") as file:
                file.write("end ")
        return trace.read_text()

    @task("ticks")
    def ticks():
        while True:
            print("tick", flush=True)
            time.sleep(0.05)
"""


async def _pid(helmr: AsyncClient, run_id: str) -> int:
    """The process id that the task has printed."""
    async for chunk in helmr.runs.logs(run_id, follow=True, stream="stdout"):
        return int(chunk.data.split()[2])
    raise AssertionError("it ended without a word")


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


async def _check_taken_over(helmr: AsyncClient, run_id: str, first: str, second: str) -> None:
    run = await helmr.runs.get(run_id)
    assert (run.status, run.attempt, run.dispatch_attempt) == ("succeeded", 1, 2)
    assert run.output == 2, "the files of the workspace are still there"
    events = await history(helmr, run)
    leases = [
        (event.data["worker"], event.attempt, event.dispatch_attempt) for event in events if event.kind == "leased"
    ]
    assert leases == [(first, 1, 1), (second, 1, 2)]
    assert [event.kind for event in events].count("lease_lost") == 1


async def test_another_worker_finishes_what_a_killed_one_began(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first:
            started = await helmr.sessions.start("once-long")
            pid = await _pid(helmr, started.run.id)
            second = await platform.add_worker()
            await first.kill()
            killed = time.monotonic()
            await started.run.wait(timeout=20)
            assert time.monotonic() - killed < topology.ACK_WAIT + 3
            await _check_taken_over(helmr, started.run.id, first.name, second.id)
            assert not _alive(pid), "what the dead worker had started is gone"
            graves = [(c.attempt, c.dispatch, c.tombstone) async for c in helmr.runs.logs(started.run) if c.tombstone]
            assert graves == [(1, 1, "worker_lost")]


@pytest.mark.slow
async def test_within_twenty_seconds_with_the_real_deadlines(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, durability="relaxed")
    await server.start()
    real = {"HELMR_TEST_PACE": "1"}
    try:
        async with (
            part(tmp_path / "parts", "control", server.url, environment=real) as control,
            worker(server.url, tmp_path, environment=real) as first,
            AsyncClient(server.url, project="acme", env="test", home=tmp_path) as helmr,
        ):
            await helmr.deployments.deploy(write_project(tmp_path / "project", "acme", TASKS))
            started = await helmr.sessions.start("once-long")
            await _pid(helmr, started.run.id)
            async with worker(server.url, tmp_path, environment=real) as second:
                await first.kill()
                killed = time.monotonic()
                await started.run.wait(timeout=30)
                assert time.monotonic() - killed < 20
                await _check_taken_over(helmr, started.run.id, first.name, second.name)
                assert await second.end() == 0
            assert await control.end() == 0
    finally:
        await server.stop()


async def test_without_another_worker_the_next_one_finishes_it(tmp_path: Path) -> None:
    """If its machine is gone as well; see test_inheritance.py for one that is not."""
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first:
            started = await helmr.sessions.start("once-long")
            await _pid(helmr, started.run.id)
            await first.kill()
        machines = Processes([tmp_path / "engine"])
        for machine in await machines.living():
            await machines.kill(machine)
        async with worker(platform.server.url, tmp_path) as second:
            await started.run.wait(timeout=20)
            await _check_taken_over(helmr, started.run.id, first.name, second.name)
            assert await second.end() == 0
        assert (await platform.nc.jetstream().consumers_info("RUNS")) != []


async def test_a_task_may_opt_out_of_being_executed_again(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first:
            started = await helmr.sessions.start("opted-out")
            await until(helmr, started.run, "started")
            await platform.add_worker()
            await first.kill()
            run = await started.run.wait(timeout=20)
            assert run.failure is not None
            assert (run.failure.code, run.attempt, run.dispatch_attempt) == ("worker_lost", 1, 1)


async def test_a_run_that_comes_back_to_the_worker_it_was_taken_from_is_not_executed_twice_at_once(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("lingers")
        await until(helmr, started.run, "started")
        control, scope = platform.control, Scope(*helmr.scope)
        lost = await lose_lease(control.log, scope, started.run.id, platform.workers[0].id)
        await redispatch(control.log, scope, started.run.id, dispatch=lost.state.dispatch, lane="default")
        run = await started.run.wait(timeout=20)
        assert (run.output, run.dispatch_attempt) == ("begin end begin end ", 2)


async def test_a_forced_cancel_needs_no_worker(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first:
            started = await helmr.sessions.start("ticks")
            await until(helmr, started.run, "started")
            await first.kill()
        async with asyncio.timeout(topology.PRESENCE_TTL + 5):
            while platform.control.presence.is_alive(first.name):  # noqa: ASYNC110  # a matter of time passing
                await asyncio.sleep(0.1)
        run = await started.run.cancel(force=True)
        assert run.status == "cancelled"
        assert [chunk.tombstone async for chunk in helmr.runs.logs(run) if chunk.tombstone] == ["worker_lost"]


async def _take_over(platform: Platform, helmr: AsyncClient, first_home: Path, second_home: Path) -> None:
    async with worker(platform.server.url, first_home) as first:
        started = await helmr.sessions.start("once-long")
        pid = await _pid(helmr, started.run.id)
        second = await platform.add_worker(home=second_home)
        first.send(signal.SIGSTOP)
        again = await until(helmr, started.run, "leased", count=2)
        assert again.data["worker"] == second.id
        run = await started.run.wait(timeout=20)
        before = await history(helmr, run)
        first.send(signal.SIGCONT)
        async with asyncio.timeout(topology.HEARTBEAT + 10):
            while _alive(pid):  # noqa: ASYNC110  # not our child: nobody tells
                await asyncio.sleep(0.05)
        await asyncio.sleep(topology.HEARTBEAT * 1.5)
        assert await history(helmr, run) == before, "the fenced worker said something"
        after = await (await helmr.sessions.start("once-long", workspace=run.workspace_id)).run.wait(timeout=20)
        assert after.output == 3
        live = await helmr.workspaces.get(run.workspace_id)
        machines = second_home / "engine" / "processes" / "machines"
        (folder,) = machines.glob(f"{run.workspace_id}.{second.id}.*")
        assert folder.is_dir()
        assert await first.end() == 0
        assert folder.is_dir(), "it is not the fenced worker's any more"
        last = await (await helmr.sessions.start("once-long", workspace=run.workspace_id)).run.wait(timeout=20)
        assert (last.output, last.dispatch_attempt) == (4, 1)
        now = await helmr.workspaces.get(run.workspace_id)
        assert (now.state, now.worker) == ("live", live.worker), "a fenced worker that ends harms nobody's machine"


async def test_a_worker_that_slept_through_its_replacement_falls_silent(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        await _take_over(platform, helmr, tmp_path, tmp_path)


async def test_its_messages_stay_with_the_new_holder(tmp_path: Path) -> None:
    """A fenced worker must not acknowledge: else, should the new holder die too, nobody would hear of it."""
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first, worker(platform.server.url, tmp_path) as second:
            started = await helmr.sessions.start("ticks")
            leased = await until(helmr, started.run, "leased")
            holder, other = (first, second) if leased.data["worker"] == first.name else (second, first)
            holder.send(signal.SIGSTOP)
            again = await until(helmr, started.run, "leased", count=2)
            assert again.data["worker"] == other.name
            holder.send(signal.SIGCONT)
            await asyncio.sleep(topology.HEARTBEAT * 1.5)
            await other.kill()
            third = await until(helmr, started.run, "leased", count=3)
            assert (third.data["worker"], third.dispatch_attempt) == (holder.name, 3)
            await started.run.cancel(force=True)
            assert (await started.run.wait(timeout=20)).status == "cancelled"
            assert await holder.end() == 0


async def test_a_worker_that_is_cut_off_ends_its_runs_if_told_so(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform, proxied(urlsplit(platform.server.url).port or 0) as proxy:
        helmr = await platform.project("acme", TASKS)
        cut_off = await platform.add_worker(url=proxy.url, end_when_cut_off=True)
        started = await helmr.sessions.start("once-long")
        pid = await _pid(helmr, started.run.id)
        proxy.hold()
        async with asyncio.timeout(60):
            while _alive(pid):  # noqa: ASYNC110  # not our child: nobody tells
                await asyncio.sleep(0.05)
        proxy.heal()
        run = await started.run.wait(timeout=60)
        assert (run.output, run.attempt, run.dispatch_attempt) == (2, 1, 2)
        leases = [event.data["worker"] for event in await history(helmr, run) if event.kind == "leased"]
        assert leases == [cut_off.id, cut_off.id]
