"""``helmr top`` beside a running Helmr: as JSON lines, and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helmr.client import AsyncClient
from helmr.errors import UsageError
from helmr.models import LiveRun
from tests.integration.platform import Platform, until
from tests.terminal import helmr_on_terminal

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from helmr import task

    @task("slow", max_duration="1m")
    def slow():
        time.sleep(60)

    @task("quick", max_duration="1m")
    def quick():
        pass
"""


@pytest.fixture
def env(platform: Platform, helmr: AsyncClient, tmp_path: Path) -> dict[str, str]:
    """The environment in which the program finds Helmr; there is no history, and it needs none."""
    names = {"HELMR_URL": platform.server.url, "HELMR_HOME": str(tmp_path)}
    return names | {"HELMR_PROJECT": helmr.scope.project, "HELMR_ENV": helmr.scope.environment}


async def _leased(helmr: AsyncClient, number: int) -> Sequence[LiveRun]:
    """The live runs, once so many are leased: control knows of that a moment after it is stored."""
    async with asyncio.timeout(30):
        while True:
            listed = await helmr.runs.live()
            if sum(run.worker is not None for run in listed) >= number:
                return listed
            await asyncio.sleep(0.02)


async def test_live_runs_are_listed_in_pages(helmr: AsyncClient) -> None:
    runs = [(await helmr.sessions.start("slow")).run for _ in range(3)]
    for run in runs:
        await until(helmr, run, "leased")
    ids = sorted(run.id for run in runs)
    listed = await _leased(helmr, len(runs))
    assert [run.id for run in listed] == ids
    assert {(run.status, run.task_id, run.worker is not None) for run in listed} == {("running", "slow", True)}
    page = await helmr.wire.call("run", "live", {"limit": 2}, dict[str, Any])
    assert ([run["id"] for run in page["runs"]], page["next"]) == (ids[:2], ids[1])
    page = await helmr.wire.call("run", "live", {"limit": 2, "after": page["next"]}, dict[str, Any])
    assert ([run["id"] for run in page["runs"]], page["next"]) == (ids[2:], None)
    with pytest.raises(UsageError, match="limit is 0"):
        await helmr.wire.call("run", "live", {"limit": 0}, dict[str, Any])
    for run in runs:
        await run.cancel(force=True)
        await run.wait()


async def test_snapshots_are_lines_that_follow_changes(helmr: AsyncClient, env: dict[str, str]) -> None:
    running = (await helmr.sessions.start("slow")).run
    await until(helmr, running, "started")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "top", "--json", "--interval", "0.1s"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **env, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    try:

        async def line() -> Any:
            assert process.stdout is not None
            return json.loads(await asyncio.wait_for(process.stdout.readline(), 30))

        first = await line()
        assert first["totals"] == {"held": 0, "queued": 0, "running": 1, "waiting": 0}
        assert [run["id"] for run in first["running"]] == [running.id]
        assert first["workers"][0]["slots"] > 0
        quick = (await helmr.sessions.start("quick")).run
        shot = first
        while quick.id not in [run["id"] for run in shot["recent"]]:
            shot = await line()
            assert shot["totals"]["running"] >= 1
        assert shot["rates"]["succeeded"] > 0
        await running.cancel(force=True)
        while (await line())["totals"]["running"]:
            pass
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.parametrize("leave", ["q", "\x03"])
async def test_the_screen_shows_runs_and_the_terminal_is_as_before(
    helmr: AsyncClient, env: dict[str, str], tmp_path: Path, leave: str
) -> None:
    async with helmr_on_terminal(["top"], env, tmp_path) as terminal:
        before = terminal.settings()
        await terminal.see("QUEUE")
        assert terminal.settings() != before
        run = (await helmr.sessions.start("slow")).run
        await terminal.see(run.id)
        await run.cancel(force=True)
        await terminal.see("ENDED LAST")
        terminal.type(leave)
        assert await terminal.end() == 0
        assert terminal.settings() == before
        assert terminal.raw.endswith("\x1b[?1049l")


async def test_without_a_terminal_it_says_what_to_do(env: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "top"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    _, told = await process.communicate()
    assert process.returncode == 2
    assert "helmr top --json" in told.decode()
