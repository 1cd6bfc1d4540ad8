"""Whoever dies while a run waits, is woken or replays: no wake-up is lost, and no step is executed twice."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from bus import records, waits
from bus.log import RUN
from bus.wakeups import Wakeups
from helmr import events, ids
from helmr.client import AsyncClient
from helmr.errors import Conflict, Unavailable
from helmr.models import StreamRecord
from helmr.subjects import Scope
from tests.chaos.machines import Processes
from tests.integration.parts import worker
from tests.integration.platform import Platform, control_of, history, kinds, running, until, write_project
from worker.execution import Execution

pytestmark = pytest.mark.anyio

TASKS = """
    import os, time
    from pathlib import Path
    from helmr import metadata, step, streams, task

    notes = streams.input("notes")

    def effect(name):
        with open("effects", "a") as file:
            file.write(name + "\\n")

    @task("waits")
    def waits():
        metadata.set("pid", os.getpid())
        step("before", effect, "before")
        found = notes.wait()
        step("after", effect, "after")
        return {"note": found, "effects": Path("effects").read_text().split()}

    @task("slow-replay", park_after=0)
    def slow_replay():
        step("one", effect, "one")
        if notes.wait() != "go":
            return "?"
        step("two", effect, "two")
        while Path("hang").exists():
            time.sleep(0.02)
        notes.wait()
        return Path("effects").read_text().split()
"""


async def _nobody_settles(*_: object) -> None:
    """What a worker does that dies right after ``waiting``."""


async def _no_answer(*_: object) -> None:
    raise Unavailable("NATS does not answer")


async def test_a_worker_that_dies_before_it_looks_loses_no_wake_up(
    helmr: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was there before the wait: only the look after ``waiting`` finds it, and control looks, too."""
    blind = SimpleNamespace(settle=_nobody_settles, outcome=waits.outcome)
    monkeypatch.setattr("worker.conclusion.waits", blind)
    started = await helmr.sessions.start("waits")
    await helmr.sessions.open(started.session).input("notes").send("early")
    assert (await started.run.result(timeout=30))["note"] == "early"


async def test_a_worker_that_cannot_look_leaves_that_to_control(
    helmr: AsyncClient, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.conclusion.waits", SimpleNamespace(settle=_no_answer, outcome=waits.outcome))
    started = await helmr.sessions.start("waits")
    await helmr.sessions.open(started.session).input("notes").send("early")
    assert (await started.run.result(timeout=60))["note"] == "early"
    assert [each.worker.dispatches.results["failed"] for each in platform.workers] == [0]


async def test_a_run_that_is_parked_before_its_files_are_looked_at(
    helmr: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture, looked = Execution._capture, asyncio.Event()

    async def late(execution: Execution) -> None:
        await execution.services.hot.park(execution.run_id)  # as may happen at any moment
        await capture(execution)
        looked.set()

    monkeypatch.setattr(Execution, "_capture", late)
    started = await helmr.sessions.start("waits")
    await until(helmr, started.run, "waiting")
    await asyncio.wait_for(looked.wait(), 60)
    await helmr.sessions.open(started.session).input("notes").send("x")
    assert (await started.run.result(timeout=60)) == {"note": "x", "effects": ["before", "after"]}


async def test_a_record_whose_control_died_wakes_its_run(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        client = await platform.project("acme", TASKS)
        started = await client.sessions.start("waits")
        await until(client, started.run, "waiting")
        session, run = started.session.id, started.run.id
    # Stored by a control that was gone before anything came of it.
    async with running(tmp_path) as platform:
        client = await platform.client("acme")
        draft = StreamRecord(
            id=ids.new("rec"), session_id=session, stream="notes", direction="in", sequence=0, data="x", at=events.now()
        )
        await records.send(platform.control.log.js, Scope(*client.scope), draft)
        done = await client.runs.wait(run, timeout=30)
        assert done.output == {"note": "x", "effects": ["before", "after"]}


async def test_a_wait_that_is_over_and_whose_run_was_not_queued(
    helmr: AsyncClient, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between ``wait_completed`` and ``queued``: the one is a fact that the other follows from."""
    started = await helmr.sessions.start("waits")
    await until(helmr, started.run, "waiting")
    scope = Scope(*helmr.scope)
    with monkeypatch.context() as patch:
        patch.setattr(Wakeups, "wake", _nobody_settles)
        await helmr.sessions.open(started.session).input("notes").send("x")
        state = (await waits.settle(platform.control.log, scope, started.run.id)).state
        assert state.status == "queued"
    assert (await started.run.result(timeout=30))["note"] == "x"


async def test_a_process_that_was_killed_while_it_was_kept(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("waits")
    await until(helmr, started.run, "waiting")
    os.kill((await started.run._runs.get(started.run.id)).metadata["pid"], signal.SIGKILL)
    await helmr.sessions.open(started.session).input("notes").send("x")
    run = await started.run.wait(timeout=30)
    assert run.output == {"note": "x", "effects": ["before", "after"]}
    assert (await kinds(helmr, run)).count("started") == 2


async def test_a_worker_that_is_killed_in_the_middle_of_a_replay(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        client = await platform.client("acme")
        await client.deployments.deploy(write_project(tmp_path / "project", "acme", TASKS))
        async with worker(platform.server.url, tmp_path) as first:
            started = await client.sessions.start("slow-replay")
            await until(client, started.run, "waiting")
            (folder,) = tmp_path.glob(f"**/workspaces/{started.run.record.workspace_id}")
            (folder / "hang").touch()
            notes = client.sessions.open(started.session).input("notes")
            await notes.send("go")
            await until(client, started.run, "step", count=2)  # it has replayed, and hangs
            await first.kill()
        machines = Processes([tmp_path / "engine"])
        for machine in await machines.living():
            await machines.kill(machine)
        (folder / "hang").unlink()
        async with worker(platform.server.url, tmp_path):
            await until(client, started.run, "waiting", count=2)
            await notes.send("end")
            assert await started.run.result(timeout=60) == ["one", "two"]
            told = [event.kind for event in await history(client, started.run)]
            assert (told.count("step"), told.count("lease_lost")) == (2, 1)


async def test_many_waits_over_a_control_that_comes_and_goes(tmp_path: Path) -> None:
    async with running(tmp_path, slots=8) as platform:
        client = await platform.project("acme", TASKS)
        started = [await client.sessions.start("waits") for _ in range(6)]
        await asyncio.gather(*(until(client, each.run, "waiting") for each in started))
        async with control_of(platform.server) as second:
            for number, each in enumerate(started):
                await client.sessions.open(each.session).input("notes").send(number)
            # Both act on every record; the append has one of them succeed.
            scope = Scope(*client.scope)
            for each in started:
                await second.reactors.wakeups.wake(scope, each.run.id)
            outputs = [(await each.run.result(timeout=60))["note"] for each in started]
        assert outputs == list(range(6))
        for each in started:
            state = (await platform.control.log.present(RUN, scope, each.run.id)).state
            assert state.consumed["notes"].ranges == ((1, 1),)
            with pytest.raises(Conflict):
                await each.run.cancel()
