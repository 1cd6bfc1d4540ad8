"""A worker that was replaced while it prepared a workspace: it begins nothing, and leaves no second machine behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bus.leases import lose_lease
from bus.log import WORKSPACE
from bus.queueing import redispatch
from helmr.client import AsyncClient
from helmr.events import Draft, WorkspaceState
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Scope
from tests.integration.platform import Platform, history, running, until
from worker.engine import MachineSpec
from worker.process_engine import ProcessEngine
from worker.process_machine import ProcessMachine

pytestmark = pytest.mark.anyio

TASKS = """
    from pathlib import Path
    from helmr import task

    @task("leaves-a-trace")
    def leaves_a_trace() -> int:
        trace = Path("trace")
        seen = int(trace.read_text()) + 1 if trace.exists() else 1
        trace.write_text(str(seen))
        return seen
"""


class _Gated(ProcessEngine):
    """An engine whose first machine takes as long as the test wants: as if the worker were stopped meanwhile."""

    preparing: asyncio.Event
    go_on: asyncio.Event

    async def materialize(self, spec: MachineSpec) -> ProcessMachine:
        if not self.preparing.is_set():
            self.preparing.set()
            await self.go_on.wait()
        return await super().materialize(spec)


@pytest.fixture
async def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Platform]:
    """A Helmr with one worker, to whom everything that it knows is old at once."""
    _Gated.preparing, _Gated.go_on = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr("tests.integration.platform.ProcessEngine", _Gated)
    for module in ("worker.run_journal", "worker.machines"):
        monkeypatch.setattr(f"{module}.STALE", -1.0)
    async with running(tmp_path) as platform:
        yield platform


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # the worker says nothing about it
            await asyncio.sleep(0.02)


async def test_a_run_that_was_lost_meanwhile_is_not_begun(platform: Platform) -> None:
    helmr = await platform.project("acme", TASKS)
    started = await helmr.sessions.start("leaves-a-trace")
    await _Gated.preparing.wait()
    worker = platform.workers[0].worker
    await lose_lease(platform.control.log, Scope(*helmr.scope), started.run.id, worker.id)
    await started.run.cancel()
    before = await history(helmr, started.run)
    assert [event.kind for event in before] == ["queued", "leased", "lease_lost", "cancelled"]
    _Gated.go_on.set()
    await _until(lambda: not worker.executions)
    assert await history(helmr, started.run) == before
    workspace = (await helmr.runs.get(started.run)).workspace_id
    assert not list(platform.home.glob(f"engine/workspaces/{workspace}/trace")), "its code did not begin"
    after = await (await helmr.sessions.start("leaves-a-trace", workspace=workspace)).run.wait(timeout=20)
    assert after.output == 1


async def test_a_machine_whose_workspace_another_worker_has_is_stopped(platform: Platform) -> None:
    helmr = await platform.project("acme", TASKS)
    started = await helmr.sessions.start("leaves-a-trace")
    await _Gated.preparing.wait()
    run = await helmr.runs.get(started.run)
    await _claim_for_another(platform, helmr, run.workspace_id)
    _Gated.go_on.set()
    lost = await until(helmr, run, "lease_lost")
    assert "elsewhere" in lost.message
    assert lost.data["orderly"], "it does not count against the run"
    assert not list(platform.home.glob("engine/processes/machines/*")), "there is no second machine"
    assert (await helmr.runs.get(run)).attempt == 1
    await started.run.cancel()


async def test_nor_is_one_used_that_was_there_before(platform: Platform) -> None:
    _Gated.go_on.set()
    helmr = await platform.project("acme", TASKS)
    run = await (await helmr.sessions.start("leaves-a-trace")).run.wait(timeout=20)
    [former] = platform.home.glob("engine/processes/machines/*")
    await _claim_for_another(platform, helmr, run.workspace_id)
    started = await helmr.sessions.start("leaves-a-trace", workspace=run.workspace_id)
    scope, log = Scope(*helmr.scope), platform.control.log
    await redispatch(log, scope, started.run.id, dispatch=1, lane="default")
    assert (await started.run.wait(timeout=20)).output == 2
    assert former not in platform.home.glob("engine/processes/machines/*"), "it is another machine"
    live = (await helmr.workspaces.get(run.workspace_id)).worker
    assert live == platform.workers[0].id, "under a claim of its own"


async def test_a_cancel_is_heeded_while_a_machine_that_was_there_before_is_replaced(platform: Platform) -> None:
    _Gated.go_on.set()
    helmr = await platform.project("acme", TASKS)
    run = await (await helmr.sessions.start("leaves-a-trace")).run.wait(timeout=20)
    await _claim_for_another(platform, helmr, run.workspace_id)
    _Gated.preparing.clear()
    _Gated.go_on.clear()
    started = await helmr.sessions.start("leaves-a-trace", workspace=run.workspace_id)
    await redispatch(platform.control.log, Scope(*helmr.scope), started.run.id, dispatch=1, lane="default")
    async with asyncio.timeout(20):
        await _Gated.preparing.wait()
    await started.run.cancel()
    assert (await started.run.wait(timeout=20)).status == "cancelled"


async def _claim_for_another(platform: Platform, helmr: AsyncClient, workspace_id: str) -> None:
    """As a worker does that takes this one for dead."""
    holder = platform.workers[0].worker

    def decide(state: WorkspaceState) -> Draft:
        host = state.host or ""
        return workspace_rules.materialize(state, worker="wrk_other", host=host, ref="", evict=holder.id)

    await platform.control.log.transact(WORKSPACE, Scope(*helmr.scope), workspace_id, decide)
