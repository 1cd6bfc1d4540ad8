"""A worker whose engine is away takes nothing, says so, and goes on by itself; one whose machine stands still gives it up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cli.status import parts_of
from helmr.errors import EngineUnavailable
from tests.integration.platform import running
from tests.patience import eventually
from worker import intake, silence
from worker.process_engine import ProcessEngine

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from pathlib import Path
    from helmr import task

    @task("hello")
    def hello() -> str:
        return "done"

    @task("stands-still")
    def stands_still() -> str:
        first = not Path("seen").exists()
        Path("seen").touch()
        if first:
            time.sleep(600)
        return "again"
"""
_AWAY = "no Docker engine answers at unix:///var/run/docker.sock: Connection refused"


async def test_runs_wait_for_the_engine_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = asyncio.Event()
    materialize, check = ProcessEngine.materialize, ProcessEngine.check

    async def failing(method: Any, *arguments: Any) -> Any:
        if away.is_set():
            raise EngineUnavailable(_AWAY)
        return await method(*arguments)

    monkeypatch.setattr(ProcessEngine, "materialize", lambda *given: failing(materialize, *given))
    monkeypatch.setattr(ProcessEngine, "check", lambda *given: failing(check, *given))
    monkeypatch.setattr(intake, "_ENGINE_RETRY", 0.05)
    async with running(tmp_path) as platform:
        client = await platform.project("acme", TASKS)
        away.set()
        started = await client.sessions.start("hello")
        async with asyncio.timeout(60):
            told = await client.runs.explain(started.run.id)
            while "engine_problems" not in told.facts:  # it was leased, is handed back, and then waits
                await asyncio.sleep(0.05)
                told = await client.runs.explain(started.run.id)
        assert told.facts["engine_problems"] == {platform.workers[0].id: _AWAY}
        assert _AWAY in told.text
        workers = (await parts_of(client))["workers"]
        assert not workers.up
        assert _AWAY in workers.detail
        assert (await client.runs.get(started.run.id)).status == "queued"
        away.clear()
        assert (await started.run.wait(timeout="100s")).status == "succeeded"
        await asyncio.to_thread(eventually, lambda: not _says_so(platform.control.presence.alive()), timeout=60.0)


def _says_so(workers: dict[str, Any]) -> bool:
    return any(info.engine_problem for info in workers.values())


async def test_a_run_whose_supervisor_stands_still_is_executed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as platform:
        client = await platform.project("acme", TASKS)
        started = await client.sessions.start("stands-still")
        async for event in client.runs.events.subscribe(started.run.id):
            if event.kind == "started":
                break
        seen = next(tmp_path.glob("engine/workspaces/*")) / "seen"
        await asyncio.to_thread(eventually, seen.exists, timeout=60.0)
        (record,) = tmp_path.glob("engine/processes/machines/*/run/supervisor.json")
        os.kill(json.loads(record.read_bytes())["pid"], signal.SIGSTOP)
        monkeypatch.setattr(silence, "ASK_EVERY", 0.05)
        run = await started.run.wait(timeout="100s")
        assert (run.status, run.output) == ("succeeded", "again")
        (lost,) = [event for event in await client.runs.events.list(run.id) if event.kind == "lease_lost"]
        assert "did not answer" in lost.data["reason"]
