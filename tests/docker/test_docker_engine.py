"""What the docker engine does beyond what every engine does: leftovers, labels, bad images, an absent engine."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from helmr import ids
from helmr.errors import EngineUnavailable, ImageError, UsageError
from tests.docker.engines import Materialize, python, run
from worker.container_spec import INSTALL, KIND, WORKER, WORKSPACE
from worker.docker_api import DockerApi
from worker.docker_engine import DockerEngine
from worker.engine import ImageSpec, MachineSpec, ProcessSpec
from worker.machine_folder import workspace_files

pytestmark = [pytest.mark.docker, pytest.mark.anyio]


def _quiet(_: str) -> None:
    """Progress that nobody reads."""


async def _containers(api: DockerApi, label: str) -> list[str]:
    found = await api.call(lambda client: client.containers(all=True, filters={"label": label}))
    return [item["Id"][:12] for item in found]


async def test_check_tells_version_and_host(engine: DockerEngine) -> None:
    first, second = await engine.check(), await engine.check()
    assert first == second
    assert first.isolated
    assert first.version[0].isdigit()
    assert first.host.startswith("host_")
    assert any(note.startswith("cgroup v") for note in first.notes)


async def test_containers_say_whose_they_are(engine: DockerEngine, materialize: Materialize, api: DockerApi) -> None:
    machine = await materialize(worker="wrk_labels")
    details = await api.call(lambda client: client.inspect_container(machine.ref))
    assert details["Name"].startswith(f"/helmr-{machine.workspace_id}-")
    labels = details["Config"]["Labels"]
    expected = {INSTALL: engine.install, WORKER: "wrk_labels", WORKSPACE: machine.workspace_id, KIND: "machine"}
    assert expected.items() <= labels.items()
    await machine.stop()


async def test_a_dead_workers_container_is_replaced_before_the_files_are_used_again(
    engine: DockerEngine, materialize: Materialize, api: DockerApi
) -> None:
    first = await materialize(worker="wrk_dead")
    await run(first, "sh", "-c", "echo kept > file")
    # Another engine on the same home, as a second worker process would have it.
    second_engine = DockerEngine(engine._home)
    spec = MachineSpec(
        workspace_id=first.workspace_id,
        worker_id="wrk_new",
        image=await engine.ensure_image(ImageSpec(), _quiet),
        network="none",
    )
    second = await second_engine.materialize(spec)
    assert await asyncio.wait_for(first.wait_lost(), 5)
    assert await _containers(api, f"{WORKSPACE}={first.workspace_id}") == [second.ref]
    assert (await run(second, "cat", "file")).stdout == "kept\n"
    await second_engine.close()
    assert await _containers(api, f"{WORKSPACE}={first.workspace_id}") == []


async def test_collect_removes_machines_of_dead_workers_alone(
    engine: DockerEngine, materialize: Materialize, api: DockerApi
) -> None:
    dead, alive = await asyncio.gather(materialize(worker="wrk_gone"), materialize(worker="wrk_here"))
    await run(dead, "sh", "-c", "echo kept > file")
    assert await engine.collect({"wrk_here"}) == [dead.ref]
    assert await _containers(api, f"{INSTALL}={engine.install}") == [alive.ref]
    again = await materialize(dead.workspace_id, worker="wrk_here")
    assert (await run(again, "cat", "file")).stdout == "kept\n"
    await asyncio.gather(again.stop(), alive.stop())


async def test_delete_removes_container_and_files(
    engine: DockerEngine, materialize: Materialize, api: DockerApi
) -> None:
    machine = await materialize()
    await run(machine, "sh", "-c", "echo gone > file")
    files = workspace_files(engine._home, machine.workspace_id)
    assert (files / "file").exists()
    await engine.delete(machine.workspace_id)
    assert await _containers(api, f"{WORKSPACE}={machine.workspace_id}") == []
    assert not files.exists()
    await engine.delete(machine.workspace_id)


async def test_a_killed_container_is_explained(materialize: Materialize, api: DockerApi) -> None:
    machine = await materialize()
    process = await machine.start(ProcessSpec(id="long", kind="argv", argv=("sleep", "60")))
    await api.call(lambda client: client.kill(machine.ref))
    assert "exit code 137" in await asyncio.wait_for(machine.wait_lost(), 5)
    frames = [frame async for frame in process.frames()]
    assert getattr(frames[-1], "cause", "") == "lost"
    await machine.stop()


async def test_a_cancelled_materialize_leaves_nothing(
    engine: DockerEngine, materialize: Materialize, api: DockerApi
) -> None:
    workspace = (await materialize()).workspace_id
    await engine.delete(workspace)
    folders = set((engine._home / "machines").iterdir())
    cancelled = 0
    for delay in (0.0, 0.01, 0.05, 0.1, 0.15):
        starting = asyncio.create_task(materialize(workspace))
        await asyncio.sleep(delay)
        starting.cancel()
        await asyncio.wait({starting})
        if starting.cancelled():
            cancelled += 1
        else:  # it was quicker
            await starting.result().stop()
        assert await _containers(api, f"{WORKSPACE}={workspace}") == []
    assert cancelled, "the first is cancelled before it can do anything"
    assert set((engine._home / "machines").iterdir()) == folders


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("rm -f /usr/bin/python3 /usr/local/bin/python3", "no python3"),
        (
            "cd /usr/bin && rm python3 && printf '#!/bin/sh\\necho too old >&2\\nexit 3' > python3 && chmod +x python3",
            "exit code 3: too old",
        ),
    ],
)
async def test_an_image_without_a_fitting_python_is_an_image_error(
    engine: DockerEngine, built: list[str], step: str, message: str
) -> None:
    name = await engine.ensure_image(ImageSpec(steps=(("run", step),)), _quiet)
    built.append(name)
    workspace = ids.new("ws")
    with pytest.raises(ImageError, match=message) as caught:
        await engine.materialize(MachineSpec(workspace_id=workspace, worker_id="wrk", image=name, network="none"))
    assert "3.10" in f"{caught.value.message} {caught.value.hint}"
    await engine.delete(workspace)


async def test_an_image_that_is_gone_is_an_image_error(engine: DockerEngine) -> None:
    spec = MachineSpec(workspace_id=ids.new("ws"), worker_id="wrk", image="helmr/image:0000000000000000")
    with pytest.raises(ImageError, match="not on this machine"):
        await engine.materialize(spec)


async def test_sources_are_readable_and_not_writable(materialize: Materialize, project: Path) -> None:
    machine = await materialize()
    await machine.put_source("dep_1", project)
    await machine.put_source("dep_1", project)
    finished = await run(
        machine, "sh", "-c", "cd /helmr/sources/dep_1 && cat link deep/private.txt && ./deep/tool.sh; touch x"
    )
    assert finished.stdout == "print('hello')\ndatatool\n"
    assert finished.exited.exit_code == 1
    for name in ("../x", "", ".hidden", "a/b"):
        with pytest.raises(UsageError):
            await machine.put_source(name, project)
    await machine.stop()


async def test_internet_means_a_way_out_and_no_interface(materialize: Materialize) -> None:
    machine = await materialize(network="internet")
    finished = await python(machine, "import os; print(os.listdir('/sys/class/net'), os.environ['HTTPS_PROXY'])")
    assert finished.stdout == "['lo'] http://127.0.0.1:3128\n"
    await machine.stop()


async def test_more_processors_than_there_are_is_as_many_as_there_are(materialize: Materialize) -> None:
    machine = await materialize(cpu=1000.0)
    assert (await run(machine, "echo", "fine")).stdout == "fine\n"
    await machine.stop()


async def test_a_deep_home_folder_is_no_obstacle(tmp_path: Path, image: str) -> None:
    engine = DockerEngine(tmp_path / ("deep" * 20) / ("folder" * 20))
    machine = await engine.materialize(
        MachineSpec(workspace_id=ids.new("ws"), worker_id="wrk", image=image, network="none")
    )
    assert (await run(machine, "echo", "reached")).stdout == "reached\n"
    await engine.delete(machine.workspace_id)
    await engine.close()


@pytest.mark.parametrize(
    ("host", "message", "hint"),
    [
        ("unix:///nowhere/docker.sock", "No such file", "--engine process"),
        ("unix://{silent}", "did not answer", "docker ps"),
        ("unix://{refusing}", "Connection refused", "--engine process"),
    ],
)
async def test_an_engine_that_cannot_be_reached_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, message: str, hint: str
) -> None:
    paths = {name: tmp_path / name for name in ("silent", "refusing")}
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as refusing:
        silent.bind(str(paths["silent"]))
        silent.listen()
        refusing.bind(str(paths["refusing"]))
        monkeypatch.setenv("DOCKER_HOST", host.format(**paths))
        monkeypatch.setattr("worker.docker_api.VERSION_TIMEOUT", 0.3)
        engine = DockerEngine(tmp_path / "home")
        with pytest.raises(EngineUnavailable, match=message) as caught:
            await engine.check()
        await engine.close()
    assert hint in str(caught.value.hint)
