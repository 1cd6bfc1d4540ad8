"""A run that ends before it was prepared anew: what a former holder has left running of it is ended first."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bus.leases import lose_lease
from bus.queueing import redispatch
from helmr.subjects import Scope
from tests.integration.platform import running
from tests.patience import eventually
from worker.lease_watch import LeaseWatch
from worker.liveness import Liveness
from worker.preparation import BrokenOff, Preparation

pytestmark = pytest.mark.anyio

TASKS = """
    import os
    import time
    from pathlib import Path
    from helmr import task

    @task("goes-on")
    def goes_on() -> None:
        Path("draft").write_text(str(os.getpid()))
        Path("draft").rename("pid")
        time.sleep(600)
"""


async def _nothing(*_: Any) -> None:
    """A worker that looks at nothing."""


async def _too_late(*_: Any) -> None:
    """Time that is up before the workspace is there."""
    raise BrokenOff


async def test_nothing_of_a_run_is_alive_when_its_time_was_up_before_it_was_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeaseWatch, "_check_leases", _nothing)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("goes-on")
        await asyncio.to_thread(eventually, lambda: list(tmp_path.glob("engine/workspaces/*/pid")), timeout=60.0)
        (note,) = tmp_path.glob("engine/workspaces/*/pid")
        process = Path("/proc", note.read_text())
        former, successor = platform.workers[0], await platform.add_worker()
        monkeypatch.setattr(Liveness, "is_alive", lambda _, worker: worker == successor.id)
        monkeypatch.setattr(Preparation, "enter", _too_late)
        log, scope = platform.control.log, Scope(*helmr.scope)
        await lose_lease(log, scope, started.run.id, former.id)
        await redispatch(log, scope, started.run.id, dispatch=1, lane=f"@{successor.id}")
        run = await started.run.wait(timeout="100s")
        assert run.failure is not None
        assert run.failure.code == "max_duration"
        assert not process.exists() or not (process / "cmdline").read_bytes(), "it lives on"
