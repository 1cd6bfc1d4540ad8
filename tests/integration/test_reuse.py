"""Many runs on one live workspace: nothing of one is left for the next."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from helmr.client import AsyncClient
from tests.integration.platform import written

pytestmark = pytest.mark.anyio

TASKS = """
    import os, sys, signal, threading, time
    from helmr import logger, metadata, task

    state = []

    @task("dirty")
    def dirty(payload: dict) -> dict:
        found = {
            "state": list(state),
            "environment": os.environ.get("LEFT"),
            "metadata": metadata.all(),
            "path": "left" in sys.path,
            "handler": signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL,
            "umask": os.umask(0o077),
            "files": len(os.listdir("/proc/self/fd")),
        }
        state.append(payload["n"])
        os.environ["LEFT"] = "yes"
        sys.path.append("left")
        signal.signal(signal.SIGUSR1, lambda *_: None)
        metadata.set("n", payload["n"])
        open("/dev/null")
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print(payload["n"])
        return found

    @task("crash")
    def crash():
        os.kill(os.getpid(), 9)
"""


async def _run(helmr: AsyncClient, workspace: str | None, n: int) -> Any:
    return await (await helmr.sessions.start("dirty", {"n": n}, workspace=workspace)).run.wait(timeout=30)


async def test_runs_in_turn_begin_alike(helmr: AsyncClient) -> None:
    first = await _run(helmr, None, 0)
    for n in range(1, 5):
        run = await _run(helmr, first.workspace_id, n)
        assert run.output == first.output
        assert run.metadata == {"n": n}
        assert (await written(helmr, run))["stdout"] == b"%d\n" % n
    assert first.output["state"] == []
    assert first.output["environment"] is None


async def test_runs_at_once_do_not_meet(helmr: AsyncClient) -> None:
    first = await _run(helmr, None, 0)
    runs = await asyncio.gather(*(_run(helmr, first.workspace_id, n) for n in range(6)))
    assert all(run.output["state"] == [] for run in runs)
    for n, run in enumerate(runs):
        assert (await written(helmr, run))["stdout"] == b"%d\n" % n


async def test_a_crash_is_no_concern_of_the_next(helmr: AsyncClient) -> None:
    first = await _run(helmr, None, 0)
    crashed = await (await helmr.sessions.start("crash", workspace=first.workspace_id)).run.wait(timeout=30)
    assert crashed.status == "failed"
    assert (await _run(helmr, first.workspace_id, 1)).output["state"] == []
