"""A worker that is killed and started again, with containers: what runs in them goes on, and nothing begins twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from tests.integration.parts import PATIENT, patient, worker
from tests.integration.platform import history, write_project, written
from worker.docker_engine import DockerEngine

pytestmark = [pytest.mark.docker, pytest.mark.anyio]

RUNS = 2
LINES = 3000
TASKS = """
    import os, time
    from pathlib import Path
    from helmr import Sandbox, task

    @task("prints", sandbox=Sandbox("small", memory="128MiB"))
    def prints() -> int:
        with open("begun", "a") as file:
            file.write("x")
        for number in range(3000):
            print(f"{number:079d}")
            while number == 1500 and not os.path.exists("gate"):
                time.sleep(0.02)
        return os.path.getsize("begun")
"""


async def _first_line(helmr: AsyncClient, run_id: str) -> None:
    async for _ in helmr.runs.logs(run_id, follow=True, stream="stdout"):
        return


async def test_runs_go_on_in_their_containers(tmp_path: Path) -> None:
    async with patient(tmp_path) as url, AsyncClient(url, project="acme", env="test", home=tmp_path) as helmr:
        await helmr.deployments.deploy(write_project(tmp_path / "project", "acme", TASKS))
        try:
            async with worker(url, tmp_path, engine="docker", environment=PATIENT) as first:
                runs = [(await helmr.sessions.start("prints")).run for _ in range(RUNS)]
                await asyncio.gather(*(_first_line(helmr, run.id) for run in runs))
                await first.kill()
            for folder in tmp_path.glob("workspaces/*"):
                (folder / "gate").touch()
            async with worker(url, tmp_path, engine="docker", environment=PATIENT) as second:
                for run in runs:
                    done = await run.wait(timeout=120)
                    assert (done.status, done.output, done.dispatch_attempt) == ("succeeded", 1, 2)
                    leases = [e.data["worker"] for e in await history(helmr, run) if e.kind == "leased"]
                    assert leases == [first.name, second.name]
                    said = await written(helmr, run)
                    assert said["stdout"] == b"".join(b"%079d\n" % number for number in range(LINES))
                assert await second.end() == 0
        finally:
            engine = DockerEngine(tmp_path)
            assert await engine.collect(set()) == []
            for folder in tmp_path.glob("workspaces/*"):
                await engine.delete(folder.name)
            await engine.close()
