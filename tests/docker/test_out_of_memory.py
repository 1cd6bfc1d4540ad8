"""Runs that want more memory than their sandbox has: the kernel ends a process of theirs, and the run says why."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.platform import Platform, kinds

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

TASKS = """
    import subprocess, sys
    from helmr import Retry, Sandbox, task

    small = Sandbox("small", memory="96MiB")
    BOMB = "bytearray(2**29)"

    @task("bomb", sandbox=small, retry=Retry(max_attempts=2, min_delay="0s"))
    def bomb():
        bytearray(2**29)

    @task("not-again", sandbox=small, retry=Retry(max_attempts=2, min_delay="0s", codes=["task_error"]))
    def not_again():
        bytearray(2**29)

    @task("child-bomb", sandbox=small)
    def child_bomb():
        subprocess.run([sys.executable, "-c", BOMB], check=True)

    @task("copes", sandbox=small)
    def copes() -> int:
        return subprocess.run([sys.executable, "-c", BOMB]).returncode
"""


async def test_a_run_out_of_memory_says_so(docker_platform: Platform) -> None:
    helmr = await docker_platform.project("acme", TASKS)
    tasks = ("bomb", "not-again", "child-bomb", "copes")
    started = [await helmr.sessions.start(task) for task in tasks]
    ends = await asyncio.gather(*(each.run.wait(timeout=120) for each in started))
    bomb, not_again, child, copes = ends
    for run in (bomb, not_again, child):
        assert run.failure is not None
        assert (run.failure.code, run.failure.retryable) == ("out_of_memory", True), run.failure
        assert "96 MiB" in run.failure.message
        assert run.failure.detail["limit_bytes"] == 96 * 1024**2
    assert [run.attempt for run in ends] == [2, 1, 1, 1]
    assert "retry_scheduled" in await kinds(helmr, bomb)
    assert (bomb.failure and bomb.failure.detail["signal"], copes.output) == (9, -9)
