"""``runs.explain`` and ``queues`` against a Helmr that runs: what they say is what is the case."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from bus.lane_loads import MIN_BACKLOG
from helmr.client import AsyncClient
from helmr.errors import NotFound
from helmr.explanation import Explanation
from tests.integration.parts import worker
from tests.integration.platform import Platform, running, until
from tests.integration.test_queues import TASKS, finish, start

pytestmark = pytest.mark.anyio


async def explained(client: AsyncClient, run: str, state: str) -> Explanation:
    """The explanation once it has this state: what it is made from may be a moment behind."""
    async with asyncio.timeout(20):
        while (told := await client.runs.explain(run)).state != state:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return told


async def test_who_holds_the_slots_and_who_is_next(tmp_path: Path) -> None:
    async with running(tmp_path, slots=8) as platform:
        client = await platform.project("queues", TASKS)
        [first] = await start(client, "quick", 1, seconds=30.0)
        await until(client, first, "started")
        second, third = [(await start(client, "quick", 1))[0] for _ in range(2)]
        told = await explained(client, third, "held_by_queue")
        assert [each["run_id"] for each in told.facts["holders"]] == [first]
        assert told.facts["ahead"] == 1
        assert first in told.text
        assert (await explained(client, first, "running")).facts["worker"] == platform.workers[0].id
        queue = await client.queues.get("one")
        assert (queue.declared, queue.concurrency, queue.in_use, queue.waiting) == (True, 1, 1, 2)
        assert [(each.run_id, each.status) for each in queue.holders] == [(first, "running")]
        assert [(each.concurrency_key, each.in_use, each.waiting) for each in queue.keys] == [(None, 1, 2)]
        listed = {each.name: (each.in_use, each.waiting) for each in await client.queues.list()}
        assert listed == {"one": (1, 2), "two": (0, 0), "fair": (0, 0)}
        await client.runs.cancel(first, force=True)
        await finish(client, [second, third])
        assert (await explained(client, second, "succeeded")).status == "succeeded"


async def test_an_unknown_queue_is_named_a_close_one(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        client = await platform.project("queues", TASKS)
        with pytest.raises(NotFound, match="no queue 'fare'") as refused:
            await client.queues.get("fare")
        assert refused.value.hint == "did you mean fair?"


async def test_what_keeps_a_run_without_a_worker(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        client = await platform.project("queues", TASKS)
        [run] = await start(client, "free", 1, ttl=600)
        told = await explained(client, run, "no_worker")
        assert "helmr worker" in told.text
        assert "it expires" in told.text
        async with worker(platform.server.url, tmp_path / "other") as there:
            await finish(client, [run])
            workspace = (await client.runs.get(run)).workspace_id
            assert await there.end() == 0
        [next_one] = await start(client, "free", 1, workspace=workspace)
        told = await explained(client, next_one, "no_worker")
        assert "host" in told.text
        assert told.facts["lane"].startswith("~host_")


async def test_when_a_failed_attempt_is_repeated_and_how_it_ended(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        client = await platform.project(
            "failing",
            """
            from helmr import Retry, task

            @task("fails", retry=Retry(max_attempts=2, min_delay="1h", max_delay="1h", jitter=False))
            def fails():
                raise ValueError("no")

            @task("dies")
            def dies():
                raise ValueError("no")
            """,
        )
        retried = (await client.sessions.start("fails")).run.id
        told = await explained(client, retried, "retrying")
        assert told.facts["attempt"] == 2
        assert "Attempt 2 is queued at" in told.text
        assert "task_error" in told.text
        dead = (await client.sessions.start("dies")).run.id
        assert "helmr run get" in (await explained(client, dead, "failed")).text


async def test_a_backlog_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        client = await platform.project("queues", TASKS)
        runs = await start(client, "free", 100)
        states = [(await client.runs.explain(run)).state for run in runs]
        assert "held_by_backlog" in states
        told = await explained(client, runs[states.index("held_by_backlog")], "held_by_backlog")
        assert told.facts["waiting"] >= told.facts["most"] == MIN_BACKLOG


async def test_on_the_command_line(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        client = await platform.project("queues", TASKS)
        [run] = await start(client, "quick", 1, concurrency_key="acme")
        await explained(client, run, "no_worker")
        assert run in await helmr(platform, "run", "explain", run)
        assert '"state":"no_worker"' in await helmr(platform, "--json", "run", "explain", run)
        assert "1 per key" in await helmr(platform, "queue", "list")
        shown = await helmr(platform, "queue", "get", "one")
        assert run in shown
        assert "acme" in shown
        assert '"in_use":1' in await helmr(platform, "queue", "get", "one", "--json")


async def helmr(platform: Platform, *words: str) -> str:
    """What a command prints."""
    place = ("--url", platform.server.url, "--project", "queues", "--env", "test")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main"),
        *words,
        *place,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
