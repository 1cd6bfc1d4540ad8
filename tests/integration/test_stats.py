"""``helmr stats`` over a history whose numbers are known."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats

from bus.setup import ensure_topology
from tests.integration.history import history, publish
from tests.lives import Life
from tests.terminal import helmr_on_terminal

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


def lived() -> list[Life]:
    """A quarter of an hour ago: ten of version 1 that succeed, ten of version 2 that fail for one reason and one that waits."""
    start = datetime.now(UTC) - timedelta(minutes=15)

    def life(version: str, task: str = "review") -> Life:
        return Life(task_id=task, deployment_version=version, start=start)

    good = [life("20260131.1").queued().leased().succeeds() for _ in range(10)]
    bad = [life("20260131.2").queued().leased().fails(message=f"no page {at} of {1.5 * at}\nmore") for at in range(10)]
    retried = life("20260131.1", "index").queued().leased().retries().succeeds()
    return [*good, *bad, retried, life("20260131.2", "index").queued().leased().waits(seconds=40.0).succeeds()]


@pytest.fixture
async def stats(nc: Nats, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """The environment in which ``helmr`` finds that history."""
    await ensure_topology(nc)
    for life in lived():
        await publish(nc, life.published())
    url = nc.connected_url
    assert url is not None
    async with history(nc, tmp_path / "h"):
        yield {"HELMR_URL": f"nats://{url.hostname}:{url.port}", "HELMR_PROJECT": "acme", "HELMR_HOME": str(tmp_path)}


async def told(env: dict[str, str], *args: str, code: int = 0) -> str:
    """What the program prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "stats", *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        cwd=env["HELMR_HOME"],
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return (out or err).decode()


async def test_tasks(stats: dict[str, str]) -> None:
    found: dict[str, Any] = json.loads(await told(stats, "--json"))
    every = found["all"]
    assert (every["runs"], every["succeeded"], every["failed"], every["retries"]) == (22, 12, 10, 1)
    by_task = {task["task_id"]: task for task in found["tasks"]}
    assert by_task["review"]["success_rate"] == 0.5
    assert by_task["index"]["wait_seconds"] == 40.0
    assert by_task["review"]["queue_p50"] == by_task["review"]["queue_p99"] == 1.0
    assert sum(span["runs"] for span in found["spans"]) == 22
    (only,) = json.loads(await told(stats, "--json", "--task", "index", "--since", "2h"))["tasks"]
    assert only["runs"] == 2
    assert "no runs of task nope in the last 1m" in await told(stats, "--task", "nope", "--since", "1m")


async def test_failures_of_one_kind_are_one(stats: dict[str, str]) -> None:
    (kind,) = json.loads(await told(stats, "failures", "--json"))
    assert (kind["code"], kind["pattern"], kind["runs"]) == ("task_error", "no page <n> of <n>", 10)
    assert kind["tasks"] == ["review"]
    assert kind["example"].startswith("run_")
    assert kind["first_seen_at"] <= kind["last_seen_at"]


async def test_slow(stats: dict[str, str]) -> None:
    first, *others = json.loads(await told(stats, "slow", "--json", "--by", "wait", "--limit", "3"))
    assert (first["task_id"], first["seconds"], first["wait_seconds"]) == ("index", 40.0, 40.0)
    assert len(others) == 2


@pytest.mark.parametrize("versions", [(), ("20260131.1", "20260131.2")])
async def test_compare_tells_that_the_last_version_is_worse(stats: dict[str, str], versions: tuple[str, ...]) -> None:
    found = json.loads(await told(stats, "compare", *versions, "--json"))
    assert (found["a"], found["b"]) == ("20260131.1", "20260131.2")
    verdicts = {task["task_id"]: (task["verdict"], task["reasons"]) for task in found["tasks"]}
    assert verdicts == {"index": ("too few runs", []), "review": ("worse", ["success -100.0 points"])}


async def test_a_version_that_never_ran_is_not_compared(stats: dict[str, str]) -> None:
    assert "no run of version 20260131.9" in await told(stats, "compare", "20260131.1", "20260131.9", code=5)
    assert "two versions, or none" in await told(stats, "compare", "20260131.1", code=2)
    assert "did you mean 'failures'" in await told(stats, "failurs", code=2)


SHOWN = [
    ("tasks", ["50.0%", "RUNS OVER TIME", "█"]),
    ("failures", ["██████████", "no page <n> of"]),
    ("slow", ["MEDIAN", "████"]),
    ("compare", ["VERDICT", "worse: success"]),
]


@pytest.mark.parametrize(("verb", "words"), SHOWN)
async def test_people_see_tables_and_charts(stats: dict[str, str], verb: str, words: list[str]) -> None:
    async with helmr_on_terminal(["stats", verb], stats, Path(stats["HELMR_HOME"])) as terminal:
        for each in words:
            await terminal.see(each)
        assert await terminal.end() == 0
