"""Containers that are started ahead: adopted by workspaces that begin empty, and otherwise like any other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from helmr import ids
from helmr.errors import Unavailable
from tests.docker.engines import python, run
from worker.container_spec import INSTALL
from worker.docker_api import DockerApi
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import ImageSpec, Limits, MachineSpec, Message, ProcessSpec, Provision, Template

pytestmark = [pytest.mark.docker, pytest.mark.anyio]


class Stocked(DockerEngine):
    """An engine that tells when it has made a machine that is nobody's yet."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, pool=1)
        self.stocked = asyncio.Semaphore(0)
        add = self._pool._add

        async def adding(kind: object) -> bool:
            added = await add(kind)  # type: ignore[arg-type]
            self.stocked.release()
            return added

        self._pool._add = adding  # type: ignore[method-assign]

    async def fresh(self, worker: str = "wrk_1", claim: int = 1, provision: Provision | None = None) -> DockerMachine:
        """A machine for a new workspace; what is then put in stock is waited for."""
        spec = await self.spec(ids.new("ws"), worker, claim)
        machine = await self.materialize(msgspec.structs.replace(spec, provision=provision))
        await asyncio.wait_for(self.stocked.acquire(), 60)
        return machine

    async def spec(self, workspace: str, worker: str = "wrk_1", claim: int = 1) -> MachineSpec:
        image = await self.ensure_image(ImageSpec(), print)
        limits = Limits(memory=128 * 1024**2, pids=64)
        return MachineSpec(workspace_id=workspace, worker_id=worker, claim=claim, image=image, limits=limits)


async def _containers(api: DockerApi, engine: DockerEngine) -> set[str]:
    label = {"label": f"{INSTALL}={engine.install}"}
    found = await api.call(lambda client: client.containers(all=True, filters=label))
    return {item["Id"][:12] for item in found}


@pytest.fixture
async def engine(tmp_path: Path, api: DockerApi) -> AsyncIterator[Stocked]:
    engine = Stocked(tmp_path)
    yield engine
    await engine.close()
    assert await _containers(api, engine) == set()
    assert list((tmp_path / "machines").iterdir()) == []


async def test_a_workspace_adopts_a_container_and_is_then_one_like_any_other(engine: Stocked, api: DockerApi) -> None:
    first = await engine.fresh()
    ready = (await _containers(api, engine)) - {first.ref}
    second = await engine.fresh()
    assert {second.ref} == ready
    code = "echo $HELMR_WORKSPACE_ID; id -u; echo kept > file; pwd; stat -c %u .; echo $HTTPS_PROXY"
    said = (await run(second, "sh", "-c", code)).stdout.split()
    assert said == [second.workspace_id, "1000", "/workspace", "1000", "http://127.0.0.1:3128"]
    files = engine.files(second.workspace_id)
    assert (files / "file").read_text() == "kept\n"
    await second.stop()
    again = await engine.materialize(await engine.spec(second.workspace_id))
    assert (await run(again, "cat", "file")).stdout == "kept\n"
    assert again.ref != second.ref  # files are there: it must not get an empty folder
    for machine in (first, second):
        await engine.delete(machine.workspace_id)
    assert not files.exists()


async def test_a_container_has_its_owners_code_ready_and_is_for_nobody_else(engine: Stocked, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    code = "import os\nfrom helmr import task\nBORN = os.getpid()\nopen('made', 'w').close()\n"
    code += (
        "@task\ndef born() -> list:\n    return [BORN != os.getpid(), os.listdir(), os.environ['HELMR_WORKSPACE_ID']]\n"
    )
    (tree / "tasks.py").write_text(code)
    template = Template(source="src", module="tasks", private=("HELMR_WORKSPACE_ID",), preload=("json",))
    ours = Provision(owner="acme.dev", source="src", tree=tree, template=template)
    first, second = [await engine.fresh(provision=ours) for _ in range(2)]
    theirs = await engine.fresh(provision=msgspec.structs.replace(ours, owner="other.dev"))
    assert [each.adopted for each in (first, second, theirs)] == [False, True, False]
    spec = ProcessSpec(
        id="born",
        source="src",
        task={"module": "tasks", "task_id": "born"},
        env={"HELMR_WORKSPACE_ID": second.workspace_id},
        preload=("json",),
        deadline=60.0,
    )
    frames = [frame async for frame in (await second.start(spec)).frames()]
    said = [frame.body for frame in frames if isinstance(frame, Message)]
    assert said[-1]["output"] == [True, ["made"], second.workspace_id]
    assert engine.files(second.workspace_id).joinpath("made").exists()
    assert not engine.files(theirs.workspace_id).joinpath("made").exists()
    for machine in (first, second, theirs):
        await engine.delete(machine.workspace_id)


async def test_the_log_says_whose_an_adopted_container_is(engine: Stocked, caplog: pytest.LogCaptureFixture) -> None:
    first, adopted = await engine.fresh(), await engine.fresh()
    code = """
import socket
with socket.create_connection(("127.0.0.1", 3128), 30) as connection:
    connection.sendall(b"CONNECT 127.0.0.1:9 HTTP/1.1\\r\\n\\r\\n")
    print(connection.recv(4096).split()[1].decode())
"""
    with caplog.at_level("INFO", "worker.egress"):
        assert (await python(adopted, code)).stdout == "403\n"
    assert f"{adopted.workspace_id}: refused: " in caplog.text
    for machine in (first, adopted):
        await engine.delete(machine.workspace_id)


async def test_whoever_comes_later_finds_an_adopted_container(engine: Stocked, api: DockerApi) -> None:
    first = await engine.fresh()
    adopted = await engine.fresh(claim=5)
    await run(adopted, "sh", "-c", "echo kept > file")
    other = DockerEngine(engine._home)
    with pytest.raises(Unavailable, match="another worker"):
        await other.materialize(await engine.spec(adopted.workspace_id, "wrk_2", claim=4))
    successor = await other.materialize(await engine.spec(adopted.workspace_id, "wrk_2", claim=6))
    assert await asyncio.wait_for(adopted.wait_lost(), 60)
    assert adopted.ref not in await _containers(api, engine)
    assert (await run(successor, "cat", "file")).stdout == "kept\n"
    await other.close()
    assert first.ref in await _containers(api, engine)


async def test_what_a_dead_worker_kept_ready_is_collected(engine: Stocked, api: DockerApi) -> None:
    adopted = [await engine.fresh(), await engine.fresh()]
    assert len(await _containers(api, engine)) == 3
    other = DockerEngine(engine._home)
    assert len(await other.collect({"wrk_2"})) == 3
    assert await _containers(api, engine) == set()
    for machine in adopted:
        assert engine.files(machine.workspace_id).is_dir()
    await other.close()
