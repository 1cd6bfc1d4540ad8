"""Secrets that images are built with: nothing that the engine keeps or tells has them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from docker import APIClient

from helmr import ids
from helmr.errors import ImageError
from tests.docker.engines import run
from worker.container_spec import INSTALL, KIND
from worker.docker_api import DockerApi
from worker.docker_engine import DockerEngine
from worker.engine import BuildSecrets, ImageSpec, MachineSpec
from worker.secret_step import BUILD

pytestmark = [pytest.mark.docker, pytest.mark.anyio]


def _giving(values: Mapping[str, str]) -> BuildSecrets:
    async def secrets() -> Mapping[str, str]:
        return values

    return secrets


def _quiet(_: str) -> None:
    """Progress that nobody reads."""


async def _containers(api: DockerApi, engine: DockerEngine) -> list[str]:
    filters = {"label": [f"{INSTALL}={engine.install}", f"{KIND}={BUILD}"]}
    return [item["Id"] for item in await api.call(lambda client: client.containers(all=True, filters=filters))]


def _told(client: APIClient, name: str) -> bytes:
    """What the engine tells of an image: its configuration and its history."""
    return json.dumps([client.inspect_image(name), client.history(name)]).encode()


def _saved(client: APIClient, name: str) -> bytes:
    """All layers of an image."""
    return b"".join(client.get_image(name))


async def test_the_command_has_the_secret_and_the_image_does_not(
    engine: DockerEngine, api: DockerApi, built: list[str]
) -> None:
    value = f"{os.urandom(12).hex()}\n-second line-\\n"
    said: list[str] = []
    steps = (
        ("env", "KEPT=1", f"STAMP={ids.new('x')}"),
        ("workdir", "/opt/made"),
        (
            "secret-run",
            'printf %s "$TOKEN" | sha256sum > sum; echo "using $TOKEN"; pwd > where; cat > rest',
            "TOKEN=pip-token",
        ),
        ("run", 'test -z "$TOKEN" && cat where > after'),
    )
    name = await engine.ensure_image(ImageSpec(steps=steps), said.append, _giving({"pip-token": value}))
    made = [line.split()[1] for line in said if line.startswith("building ")]
    assert made[-1] == name
    assert len(made) == 3
    built += reversed(made)
    kept = await api.call(lambda client: b"".join([_told(client, each) for each in made] + [_saved(client, name)]))
    for part in value.strip("\\n").split("\n"):
        assert part.encode() not in kept
    assert not [line for line in said if value[:24] in line]
    assert await _containers(api, engine) == []
    workspace = ids.new("ws")
    machine = await engine.materialize(MachineSpec(workspace_id=workspace, worker_id="wrk", image=name, network="none"))
    show = 'cd /opt/made; cut -c1-64 sum; cat where after; wc -c < rest; echo "$KEPT$TOKEN"'
    finished = await run(machine, "sh", "-c", show)
    await engine.delete(workspace)
    assert finished.stdout.split() == [hashlib.sha256(value.encode()).hexdigest(), "/opt/made", "/opt/made", "0", "1"]


async def test_another_value_makes_no_other_image(engine: DockerEngine, built: list[str]) -> None:
    spec = ImageSpec(steps=(("secret-run", f"echo {ids.new('x')}", "TOKEN=t"),))
    built.append(await engine.ensure_image(spec, _quiet, _giving({"t": "first-value"})))
    fresh = DockerEngine(engine._home)  # one that has not seen the image yet
    try:
        assert await fresh.ensure_image(spec, _quiet, None) == built[-1]
    finally:
        await fresh.close()


async def test_a_command_that_fails_shows_its_output_masked(engine: DockerEngine, api: DockerApi) -> None:
    spec = ImageSpec(steps=(("secret-run", 'echo "no access with $TOKEN" >&2; exit 9', "TOKEN=t"),))
    with pytest.raises(ImageError, match="exit code 9") as caught:
        await engine.ensure_image(spec, _quiet, _giving({"t": "not-for-you"}))
    assert caught.value.details["log"] == "no access with ***"
    assert await _containers(api, engine) == []


async def test_without_a_run_there_is_nothing_to_build_it_with(engine: DockerEngine) -> None:
    spec = ImageSpec(steps=(("secret-run", f"echo {ids.new('x')}", "TOKEN=pip-token"),))
    with pytest.raises(ImageError, match="needs the secret pip-token"):
        await engine.ensure_image(spec, _quiet)


async def test_a_cancelled_step_ends_and_leaves_no_container(
    engine: DockerEngine, api: DockerApi, tmp_path: Path
) -> None:
    spec = ImageSpec(steps=(("secret-run", f"sleep 611 # {tmp_path.name}", "TOKEN=t"),))
    asked = asyncio.Event()

    async def secrets() -> Mapping[str, str]:
        asked.set()
        return {"t": "not-for-the-engine"}

    building = asyncio.create_task(engine.ensure_image(spec, _quiet, secrets))
    await asked.wait()
    while not await _containers(api, engine):  # noqa: ASYNC110  # the engine tells nobody
        await asyncio.sleep(0.05)
    await engine._images.collect()  # which is for what dead workers have left
    (ref,) = await _containers(api, engine)
    known = await api.call(lambda client: [client.inspect_container(ref), client.diff(ref)])
    assert "not-for-the-engine" not in json.dumps(known)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert await _containers(api, engine) == []


async def test_what_a_dead_worker_was_building_is_removed(engine: DockerEngine, api: DockerApi, image: str) -> None:
    labels = {INSTALL: engine.install, KIND: BUILD, "helmr.image": "0" * 64}
    await api.call(lambda client: client.create_container(image, ["true"], labels=labels))
    await engine.collect(set())
    assert await _containers(api, engine) == []
