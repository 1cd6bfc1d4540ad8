"""Control dies in the middle of a start, and nobody asks again: the start is finished all the same, once."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from bus.server import EmbeddedServer
from helmr.client import AsyncClient
from helmr.subjects import Scope
from tests.integration.parts import part, worker
from tests.integration.platform import control_of, write_project

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("say")
    def say(payload):
        return payload
"""


async def _interrupted_start(server: EmbeddedServer, folder: Path, client: AsyncClient, appends: int) -> None:
    """A start whose control dies after so many appends."""
    folder.mkdir()
    mortal = {"TMPDIR": str(folder)}  # it cannot tidy up
    async with part(folder, "control", server.url, str(appends), environment=mortal) as control:
        starting = asyncio.create_task(client.sessions.start("say", False, external_id="x", tags=["t"], ttl="1h"))
        async with asyncio.timeout(20):
            assert await control.process.wait() == 9
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting


async def _runs(client: AsyncClient) -> asyncio.Queue[str]:
    """The ids of the runs that are queued from now on."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        await heard.put(message.subject.split(".")[5])

    await client.wire.nc.subscribe(f"helmr.event.{Scope(*client.scope)}.run.*.queued.>", cb=hear)
    await client.wire.nc.flush()
    return heard


@pytest.mark.parametrize("appends", [1, 2])
async def test_a_start_is_finished_without_its_client(tmp_path: Path, appends: int) -> None:
    server = EmbeddedServer(tmp_path, durability="relaxed")
    await server.start()
    try:
        async with AsyncClient(server.url, project="acme", env="test", home=tmp_path) as client:
            async with control_of(server):
                await client.deployments.deploy(write_project(tmp_path / "project", "acme", TASKS))
            runs = await _runs(client)
            await _interrupted_start(server, tmp_path / "parts", client, appends)
            async with control_of(server), worker(server.url, tmp_path) as executing:
                async with asyncio.timeout(20):
                    run = await client.runs.wait(await runs.get(), timeout=20)
                assert (run.status, run.output, run.tags, run.ttl) == ("succeeded", False, ("t",), 3600)
                again = await client.sessions.start("say", False, external_id="x", tags=["t"], ttl="1h")
                assert (again.run.id, again.session.id, again.reused) == (run.id, run.session_id, True)
                assert runs.empty()
                assert await executing.end() == 0
    finally:
        await server.stop()
