"""A worker whose disk is almost full takes nothing new, says so, and goes on when there is room."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.platform import Platform, running
from tests.patience import eventually
from worker import disk_watch

pytestmark = pytest.mark.anyio

TASKS = """
    import os, time
    from pathlib import Path
    from helmr import Sandbox, task

    @task("hello")
    def hello() -> str:
        return "done"

    SMALL = Sandbox("small", disk="4MiB")

    @task("fill", sandbox=SMALL)
    def fill(payload: dict) -> str:
        with Path("filler").open("wb") as filler:
            for _ in range(payload["mib"]):
                filler.write(os.urandom(1024**2))
            filler.flush()
            os.fsync(filler.fileno())
        time.sleep(payload.get("sleep", 0))
        return "filled"
"""


class _Usage(NamedTuple):
    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of every disk, as the worker is told; the last one counts."""
    told = [10 * 1024**3]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(told[-1]))
    return told


async def test_no_run_is_taken_until_there_is_room(free: list[int], tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        client = await platform.project("acme", TASKS)
        free.append(100 * 1024**2)
        await asyncio.to_thread(eventually, lambda: _full(platform), timeout=60.0)
        started = await client.sessions.start("hello")
        told = await client.runs.explain(started.run.id)
        assert "almost full" in told.text
        assert told.facts["disk_full"] == [platform.workers[0].id]
        free.append(600 * 1024**2)  # more than it took to stop, but not enough to go on
        assert (await client.runs.get(started.run.id)).status == "queued"
        free.append(10 * 1024**3)
        assert (await started.run.wait(timeout="100s")).status == "succeeded"


async def test_a_run_whose_workspace_takes_too_much_is_ended(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_watch, "PAUSE", 0.05)
    client = await platform.project("overfull", TASKS)
    started = await client.sessions.start("fill", {"mib": 6, "sleep": 600})
    run = await started.run.wait(timeout="100s")
    assert run.failure is not None
    assert (run.status, run.failure.code, run.failure.detail["limit"]) == ("failed", "disk_full", 4 * 1024**2)
    assert run.failure.detail["used"] > 4 * 1024**2
    # Nothing is lost: it can be looked at, and some of it be removed.
    (file,) = await client.workspaces.files(run.workspace_id)
    assert (file.path, file.size) == ("filler", 6 * 1024**2)
    await client.workspaces.exec(run.workspace_id, ["truncate", "-s", "0", "filler"])
    again = await client.sessions.start("fill", {"mib": 1}, workspace=run.workspace_id)
    assert (await again.run.wait(timeout="100s")).output == "filled"


def _full(platform: Platform) -> bool:
    workers = platform.control.presence.alive().values()
    return any(worker.full for worker in workers)
