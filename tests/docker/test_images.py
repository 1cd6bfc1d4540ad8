"""Images as the engine builds them: what steps do, what is built again, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from helmr import ids
from helmr.errors import ImageError
from tests.docker.engines import run
from worker.base_sources import from_host
from worker.base_tree import Tree
from worker.docker_api import DockerApi
from worker.docker_build import archive, build
from worker.docker_engine import DockerEngine
from worker.engine import ImageSpec, MachineSpec

pytestmark = [pytest.mark.docker, pytest.mark.anyio]


def _quiet(_: str) -> None:
    """Progress that nobody reads."""


async def test_steps_take_effect_in_order(engine: DockerEngine, project: Path, built: list[str]) -> None:
    spec = ImageSpec(
        steps=(
            ("copy", "deep", "/opt/deep"),
            ("env", 'GREETING=say "hi" to $USER \\o/', "SECOND=2"),
            ("workdir", "/opt/made"),
            ("run", 'echo "$GREETING" > here\nsh /opt/deep/tool.sh >> here'),
            ("user", "task"),
            ("run", "id -un > /tmp/user"),
        ),
        context=project,
    )
    name = await engine.ensure_image(spec, _quiet)
    built.append(name)
    workspace = ids.new("ws")
    machine = await engine.materialize(MachineSpec(workspace_id=workspace, worker_id="wrk", image=name, network="none"))
    finished = await run(machine, "sh", "-c", 'cat /opt/made/here; echo "$GREETING $SECOND"; ls -l /opt/deep; id -u')
    await engine.delete(workspace)
    lines = finished.stdout.splitlines()
    assert lines[:3] == ['say "hi" to $USER \\o/', "tool", 'say "hi" to $USER \\o/ 2']
    assert [line.split()[0] for line in lines[4:6]] == ["-rw-r--r--", "-rwxr-xr-x"]
    assert lines[-1] == "1000"


async def test_python_packages_can_be_installed(engine: DockerEngine, project: Path, built: list[str]) -> None:
    wheel = project / "greet-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("greet.py", "print('installed')\n")
        files.writestr("greet-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greet\nVersion: 1.0\n")
        files.writestr("greet-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr("greet-1.0.dist-info/RECORD", "")
    steps = (("copy", wheel.name, "/opt/"), ("pip", f"/opt/{wheel.name}"), ("run", "python3 -m greet && pip --version"))
    built.append(await engine.ensure_image(ImageSpec(steps=steps, context=project), _quiet))


async def test_one_image_is_built_once_however_many_ask(engine: DockerEngine, built: list[str]) -> None:
    said: list[str] = []
    spec = ImageSpec(steps=(("run", f"echo {ids.new('x')} > /once"),))
    names = await asyncio.gather(*(engine.ensure_image(spec, said.append) for _ in range(5)))
    built.append(names[0])
    assert len(set(names)) == 1
    assert sum(line.startswith("building ") for line in said) == 1


async def test_changed_files_make_another_image(engine: DockerEngine, project: Path, built: list[str]) -> None:
    changed = project.with_name("changed")
    shutil.copytree(project, changed)
    (changed / "main.py").write_text("print('changed')\n")
    steps = (("copy", "main.py", "/opt/"),)
    built += [await engine.ensure_image(ImageSpec(steps=steps, context=tree), _quiet) for tree in (project, changed)]
    assert built[-2] != built[-1]


async def test_a_failed_step_shows_its_output_and_leaves_no_container(engine: DockerEngine, api: DockerApi) -> None:
    before = {item["Id"] for item in await api.call(lambda client: client.containers(all=True))}
    with pytest.raises(ImageError, match="non-zero code: 3") as caught:
        await engine.ensure_image(ImageSpec(steps=(("run", "seq 100; echo it broke; exit 3"),)), _quiet)
    log = caught.value.details["log"].splitlines()
    assert len(log) == 30
    assert "it broke" in log
    after = await api.call(lambda client: client.containers(all=True))
    assert not [item for item in after if item["Id"] not in before and "exit 3" in item["Command"]]


async def test_a_cancelled_build_ends_at_once(engine: DockerEngine, api: DockerApi) -> None:
    stamp = ids.new("x")
    reached = asyncio.Event()
    spec = ImageSpec(steps=(("run", f"sleep 61 # {stamp}"),))

    def progress(text: str) -> None:
        if "sleep 61" in text:
            reached.set()

    building = asyncio.create_task(engine.ensure_image(spec, progress))
    await asyncio.wait_for(reached.wait(), 20)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(building, 10)
    for _ in range(100):
        left = await api.call(lambda client: client.containers(all=True))
        if not [item for item in left if stamp in item["Command"]]:
            return
        await asyncio.sleep(0.1)
    pytest.fail("the engine goes on building")


async def test_the_base_can_be_made_of_this_machines_python(tmp_path: Path, api: DockerApi, built: list[str]) -> None:
    layer = tmp_path / "layer.tar"
    with tarfile.open(layer, "w") as out:
        tree = Tree(out)
        contents = from_host(tree)
        tree.system_files()
    name = f"helmr/test:{ids.new('x')[-12:]}"
    built.append(name)
    await api.call(lambda client: client.import_image(str(layer), repository="helmr/test", tag=name.partition(":")[2]))
    smoke = 'python3 -c "import asyncio, ctypes, json, ssl, sqlite3" && pip --version && ls / | wc -l && bash -c true'
    text = f"FROM {name}\nRUN {smoke}\n"
    await build(api, archive({"Dockerfile": text.encode()}), tag=name, labels={}, progress=_quiet)
    assert contents.python.startswith("3.")
    assert os.fspath(contents.modules)
