"""Files that outlive runs: the next run, a stopped workspace, another worker; and when machines are stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from bus.host_rescue import HostRescue
from bus.log import WORKSPACE
from helmr.client import AsyncClient
from helmr.errors import Conflict, NotFound
from helmr.models import Run
from tests.integration.platform import Platform, history, running, until
from worker.machines import Machines

pytestmark = pytest.mark.anyio

TASKS = """
    import os, time
    from pathlib import Path
    from helmr import task

    @task("count")
    def count() -> list:
        file = Path("count")
        seen = int(file.read_text()) + 1 if file.exists() else 1
        file.write_text(str(seen))
        return [seen, os.getcwd()]

    @task("where")
    def where() -> str:
        time.sleep(0.1)
        return os.getcwd()

    @task("sleep")
    def sleep():
        print("begun", flush=True)
        time.sleep(30)
"""


async def _count(helmr: AsyncClient, workspace: str | None = None) -> tuple[str, int]:
    run = await (await helmr.sessions.start("count", workspace=workspace)).run.wait(timeout=30)
    assert run.status == "succeeded", run.failure
    return run.workspace_id, run.output[0]


def _defaults() -> dict[str, Any]:
    defaults = Machines.__init__.__kwdefaults__
    assert defaults is not None
    return defaults


async def test_the_next_run_on_a_workspace_sees_its_files(helmr: AsyncClient) -> None:
    workspace, first = await _count(helmr)
    assert (first, await _count(helmr, workspace)) == (1, (workspace, 2))
    other, alone = await _count(helmr)
    assert other != workspace
    assert alone == 1


async def test_files_stay_when_a_workspace_is_stopped(helmr: AsyncClient) -> None:
    workspace, _ = await _count(helmr)
    assert (await helmr.workspaces.get(workspace)).state == "live"
    stopped = await helmr.workspaces.stop(workspace)
    assert (stopped.state, stopped.worker) == ("stopped", None)
    assert (await helmr.workspaces.stop(workspace)).state == "stopped"
    assert await _count(helmr, workspace) == (workspace, 2)
    assert (await helmr.workspaces.get(workspace)).state == "live"


async def test_a_workspace_is_claimed_once_ahead_of_its_first_run(platform: Platform, helmr: AsyncClient) -> None:
    workspace, _ = await _count(helmr)
    events = await platform.control.log.events(WORKSPACE, helmr.scope, workspace)
    assert [event.kind for event in events if event.kind != "captured"] == ["created", "materialized"]


async def test_a_workspace_that_was_claimed_for_nothing_is_given_up(platform: Platform, helmr: AsyncClient) -> None:
    workspace = (await helmr.workspaces.create(task="count")).id
    async with platform.workers[0].worker.machines.foreseen(helmr.scope, workspace):
        pass
    events = await platform.control.log.events(WORKSPACE, helmr.scope, workspace)
    assert [event.kind for event in events] == ["created", "materialized", "stopped"]
    assert await _count(helmr, workspace) == (workspace, 1)


async def test_a_workspace_in_use_is_not_stopped(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("sleep")
    await until(helmr, started.run, "started")
    with pytest.raises(Conflict, match="in use"):
        await helmr.workspaces.stop(started.session.workspace_id)
    await started.run.cancel(force=True)
    await started.run.wait(timeout=20)
    assert (await helmr.workspaces.stop(started.session.workspace_id)).state == "stopped"


async def test_a_workspace_nobody_knows_is_not_found(helmr: AsyncClient) -> None:
    with pytest.raises(NotFound):
        await helmr.workspaces.get("ws_" + "0" * 24)


async def test_files_survive_their_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        workspace, _ = await _count(helmr)
        first = platform.workers[0]
        await platform.stop_worker(first)
        assert (await helmr.workspaces.get(workspace)).state == "stopped"
        second = await platform.add_worker()
        assert second.id != first.id
        assert await _count(helmr, workspace) == (workspace, 2)
        assert (await helmr.workspaces.get(workspace)).worker == second.id


async def test_a_run_waits_for_the_home_of_its_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine so slow that the worker seems to be gone for good would have it go on elsewhere.
    monkeypatch.setattr(HostRescue, "look", AsyncMock())
    async with running(tmp_path / "one") as platform:
        helmr = await platform.project("acme", TASKS)
        workspace, _ = await _count(helmr)
        await platform.stop_worker(platform.workers[0])
        await platform.add_worker(home=tmp_path / "two")
        started = await helmr.sessions.start("count", workspace=workspace)
        await asyncio.sleep(1)
        assert (await helmr.runs.get(started.run)).status == "queued", "its files are elsewhere"
        back = await platform.add_worker()
        run = await started.run.wait(timeout=30)
        assert run.output[0] == 2
        assert [event.data["worker"] for event in await history(helmr, run) if event.kind == "leased"] == [back.id]


async def test_runs_share_a_live_workspace(helmr: AsyncClient) -> None:
    workspace, _ = await _count(helmr)
    started = await asyncio.gather(*(helmr.sessions.start("where", workspace=workspace) for _ in range(4)))
    runs = await asyncio.gather(*(each.run.wait(timeout=30) for each in started))
    assert {run.status for run in runs} == {"succeeded"}
    assert len({run.output for run in runs}) == 1


async def test_an_idle_workspace_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_defaults(), "idle_stop", 0.5)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        workspace, _ = await _count(helmr)
        async with asyncio.timeout(5):
            while (await helmr.workspaces.get(workspace)).state == "live":  # noqa: ASYNC110  # a matter of time passing
                await asyncio.sleep(0.1)
        assert await _count(helmr, workspace) == (workspace, 2)


async def test_of_too_many_idle_workspaces_the_oldest_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_defaults(), "max_idle", 2)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        made = [(await _count(helmr))[0] for _ in range(4)]
        async with asyncio.timeout(5):
            while True:
                states = [(await helmr.workspaces.get(workspace)).state for workspace in made]
                if states == ["stopped", "stopped", "live", "live"]:
                    break
                await asyncio.sleep(0.1)


BOXED = """
    from pathlib import Path
    from helmr import Sandbox, streams, task

    more = streams.input("more")

    @task("boxed", sandbox=Sandbox("box", memory="512MiB"))
    def boxed() -> bool:
        seen = Path("seen").exists()
        Path("seen").touch()
        return seen
"""


async def test_a_workspace_goes_on_in_another_sandbox_and_no_longer_in_its_former_one(platform: Platform) -> None:
    former = await platform.project("boxes", BOXED)
    first = await former.sessions.start("boxed")
    await first.run.wait(timeout=60)
    workspace = first.session.workspace_id
    grown = await platform.project("boxes", BOXED.replace("512MiB", "1GiB"))
    with pytest.raises(Conflict, match="memory 512 MiB"):
        await grown.sessions.start("boxed", workspace=workspace)

    updated = await grown.workspaces.update(workspace, task="boxed", tag=["moved"], metadata={"owner": "ada"})
    current = await grown.deployments.get()
    assert (updated.state, updated.deployment_id, updated.tags) == ("stopped", current.id, ("moved",))
    run = await (await grown.sessions.start("boxed", workspace=workspace)).run.wait(timeout=60)
    assert (run.status, run.output) == ("succeeded", True)
    same = await grown.workspaces.update(workspace, sandbox="box", tag=["again"])  # nothing is stopped for that
    assert (same.state, same.tags, same.metadata) == ("live", ("again", "moved"), {"owner": "ada"})

    inbox = grown.sessions.open(first.session).input("more")
    for turn in (1, 2):  # the session still has the former deployment
        await inbox.send({})
        refused = await _turn(grown, first.session.id, turn)
        assert refused.failure is not None
        assert refused.failure.code == "workspace_error"
        assert "memory 1 GiB (the task needs 512 MiB)" in refused.failure.message
        await grown.workspaces.stop(workspace)


async def _turn(helmr: AsyncClient, session: str, number: int) -> Run:
    """The run of a turn of a session, when it has ended."""
    async with asyncio.timeout(60):
        while (found := await helmr.sessions.get(session)).turn < number:  # noqa: ASYNC110  they are not followed live
            await asyncio.sleep(0.05)
    return await helmr.runs.wait(found.run_id, timeout=60)
