"""The examples do what their READMEs say, in containers: ``codebase-report`` on the whole standard library of its image."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helmr.connection import connect
from tests.examples import (
    check_hello,
    check_human_approval,
    check_nightly_digest,
    check_report,
    check_webhook_token,
    succeeded,
)
from tests.integration.platform import Platform, RunningWorker, running
from worker.docker_engine import DockerEngine
from worker.worker import Worker

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
async def docker_platform(tmp_path: Path) -> AsyncIterator[Platform]:
    """A Helmr of one worker with the docker engine."""
    async with running(tmp_path, workers=0) as platform:
        nc = await connect(platform.server.url, name="worker")
        engine, cleaner = DockerEngine(tmp_path), DockerEngine(tmp_path)  # a worker closes its engine
        worker = RunningWorker(Worker(nc, engine, await engine.check(), home=tmp_path, slots=2), nc)
        await worker.start()
        platform.workers.append(worker)
        try:
            yield platform
        finally:
            await platform.stop_worker(worker)
            for folder in tmp_path.glob("workspaces/*"):
                await cleaner.delete(folder.name)
            await cleaner.close()


async def test_hello(docker_platform: Platform) -> None:
    await check_hello(docker_platform)


async def test_codebase_report_of_the_standard_library(docker_platform: Platform) -> None:
    run = await succeeded(docker_platform, "codebase-report")
    totals = run.output
    assert totals["files"] > 1000
    assert totals["packages"] > 150
    assert totals["lines"] > 400_000
    assert totals["functions"] > 10_000
    assert totals["errors"] < totals["files"] / 50
    await check_report(docker_platform, run)


async def test_human_approval(docker_platform: Platform) -> None:
    await check_human_approval(docker_platform)


async def test_webhook_token(docker_platform: Platform) -> None:
    await check_webhook_token(docker_platform)


async def test_nightly_digest(docker_platform: Platform) -> None:
    await check_nightly_digest(docker_platform)
