"""A Docker engine for tests: the base image made once, machines on demand, and nothing of them left afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from helmr import ids
from helmr.errors import NotFound
from tests.docker.engines import Materialize, docker_running
from tests.integration.platform import Platform
from worker.container_spec import INSTALL
from worker.docker_api import DockerApi, remove_container
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import ImageSpec, Limits, MachineSpec, Network


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[DockerApi]:
    """The engine itself, for looking at what Helmr made of it."""
    api = DockerApi()
    yield api
    await api.close()


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory, api: DockerApi) -> AsyncIterator[DockerEngine]:
    """An engine with a home of its own; fails the module when a container of it is left at the end."""
    engine = DockerEngine(tmp_path_factory.mktemp("home"))
    yield engine
    label = {"label": f"{INSTALL}={engine.install}"}
    containers = await api.call(lambda client: client.containers(all=True, filters=label))
    for item in containers:
        await remove_container(api, item["Id"])
    await engine.close()
    assert not containers


@pytest.fixture(scope="module")
async def image(engine: DockerEngine) -> str:
    """The default image of a sandbox."""
    return await engine.ensure_image(ImageSpec(), print)


@pytest.fixture(scope="module")
async def materialize(engine: DockerEngine, image: str) -> AsyncIterator[Materialize]:
    """Makes machines; their workspaces are deleted at the end of the module."""
    made: set[str] = set()

    async def make(
        workspace: str = "",
        *,
        worker: str = "wrk_test",
        claim: int = 0,
        network: Network | None = None,
        **limits: Any,
    ) -> DockerMachine:
        spec = MachineSpec(
            workspace_id=workspace or ids.new("ws"),
            worker_id=worker,
            claim=claim,
            image=image,
            network=network or ("none" if engine.name == "docker" else "internet"),
            limits=Limits(**{"memory": 256 * 1024**2, "pids": 64, **limits}),
        )
        made.add(spec.workspace_id)
        return await engine.materialize(spec)

    yield make
    for workspace in made:
        await engine.delete(workspace)


@pytest.fixture
async def built(api: DockerApi) -> AsyncIterator[list[str]]:
    """The names of images a test has built; they are removed at its end."""
    names: list[str] = []
    yield names
    for name in names:
        with contextlib.suppress(NotFound):
            await api.call(functools.partial(_remove_image, name))


def _remove_image(name: str, client: APIClient) -> None:
    client.remove_image(name, force=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a few files, as a deployment has them."""
    folder = tmp_path / "project"
    (folder / "deep").mkdir(parents=True)
    (folder / "main.py").write_text("print('hello')\n")
    (folder / "deep" / "private.txt").write_text("data")
    (folder / "deep" / "private.txt").chmod(0o600)
    (folder / "deep" / "tool.sh").write_text("#!/bin/sh\necho tool\n")
    (folder / "deep" / "tool.sh").chmod(0o700)
    (folder / "link").symlink_to("main.py")
    return folder


@pytest.fixture
async def docker_platform(tmp_path: Path) -> AsyncIterator[Platform]:
    """A Helmr of one worker with the docker engine."""
    async with docker_running(tmp_path, slots=2) as platform:
        yield platform
