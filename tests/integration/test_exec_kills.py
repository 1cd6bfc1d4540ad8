"""Execs whose worker, or whose connections, go in the middle: the client hears of it, and no process is left."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from helmr.client.execs import exit_code_of
from helmr.errors import HelmrError
from tests.integration.parts import worker
from tests.integration.platform import running

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("nothing")
    def nothing() -> None: ...
"""


async def _workspace(helmr: AsyncClient) -> str:
    return (await (await helmr.sessions.start("nothing")).run.wait(timeout=60)).workspace_id


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_killed_worker_is_a_clear_error_and_leaves_no_process(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        async with worker(platform.server.url, tmp_path) as first:
            workspace = await _workspace(helmr)
            script = ["sh", "-c", "echo $$; exec sleep 600"]
            detached = await helmr.workspaces.execs.start(workspace, script)
            async with await helmr.workspaces.execs.open(workspace, script) as process:
                pid = int((await anext(aiter(process))).data)
                await first.kill()
                async with asyncio.timeout(60):
                    ended = await process.wait()
        assert ended.status == "lost"
        with pytest.raises(HelmrError, match=f"was lost: its worker {first.name} was lost"):
            exit_code_of(ended)
        assert (await helmr.workspaces.execs.get(detached)).status == "lost"
        await platform.add_worker()
        assert (await helmr.workspaces.exec(workspace, ["echo", "on"])).stdout == b"on\n"
        assert not _alive(pid)


async def test_a_worker_that_stops_ends_its_execs(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        workspace = await _workspace(helmr)
        async with await helmr.workspaces.execs.open(workspace, ["sh", "-c", "echo $$; exec sleep 600"]) as process:
            pid = int((await anext(aiter(process))).data)
            await platform.stop_worker(platform.workers[0])
            ended = await process.wait()
        assert (ended.status, ended.reason) == ("exited", "its worker was stopped")
        assert not _alive(pid)


async def test_bytes_are_whole_although_the_server_is_killed(tmp_path: Path) -> None:
    data = os.urandom(20_000_000)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        workspace = await _workspace(helmr)
        async with await helmr.workspaces.execs.open(workspace, ["cat"]) as process:
            feeding = asyncio.create_task(_feed(process.write, process.end_input, data))
            digest, size, killed = hashlib.sha256(), 0, False
            async with asyncio.timeout(120):
                async for chunk in process:
                    digest.update(chunk.data)
                    size += len(chunk.data)
                    if size > 4_000_000 and not killed:
                        killed = True
                        assert platform.server._process is not None
                        platform.server._process.kill()
            await feeding
            assert (await process.wait()).exit_code == 0
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()


async def _feed(write: object, end: object, data: bytes) -> None:
    await write(data)  # type: ignore[operator]
    await end()  # type: ignore[operator]
