"""What a worker that comes back after a kill -9 finds alive, it keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.log import WORKSPACE
from helmr.reducers import workspace as rules
from helmr.subjects import Scope
from tests.integration.parts import worker
from tests.integration.platform import Platform, running

pytestmark = pytest.mark.anyio

TASKS = """
    import os
    from helmr import task

    @task("where")
    def where() -> int:
        return os.getppid()
"""


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with running(tmp_path, workers=0) as platform:
        yield platform


def _machines(home: Path) -> list[str]:
    return [path.name for path in home.glob("engine/processes/machines/*")]


async def test_an_idle_workspace_stays_alive(platform: Platform) -> None:
    helmr = await platform.project("acme", TASKS)
    async with worker(platform.server.url, platform.home) as first:
        before = await (await helmr.sessions.start("where")).run.wait(timeout=60)
        await first.kill()
    left = _machines(platform.home)
    second = await platform.add_worker()
    live = await helmr.workspaces.get(before.workspace_id)
    assert (live.state, live.worker) == ("live", second.id)
    after = await (await helmr.sessions.start("where", workspace=before.workspace_id)).run.wait(timeout=60)
    assert after.status == "succeeded"
    assert _machines(platform.home) == left, "it is the machine that was there"
    assert (await helmr.workspaces.stop(before.workspace_id)).state == "stopped"
    assert _machines(platform.home) == []


async def test_what_the_log_has_given_to_others_is_ended(platform: Platform) -> None:
    helmr = await platform.project("acme", TASKS)
    async with worker(platform.server.url, platform.home) as first:
        run = await (await helmr.sessions.start("where")).run.wait(timeout=60)
        await first.kill()
    assert _machines(platform.home)
    scope = Scope(*helmr.scope)
    await platform.control.log.transact(
        WORKSPACE, scope, run.workspace_id, lambda state: rules.stop(state, worker=first.name, reason="a test")
    )
    await platform.add_worker()
    assert _machines(platform.home) == []
    assert (await helmr.workspaces.get(run.workspace_id)).state == "stopped"
