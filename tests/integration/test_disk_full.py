"""A worker whose disk is almost full takes nothing new, says so, and goes on when there is room."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.platform import Platform, running
from tests.patience import eventually

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("hello")
    def hello() -> str:
        return "done"
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


def _full(platform: Platform) -> bool:
    workers = platform.control.presence.alive().values()
    return any(worker.full for worker in workers)
