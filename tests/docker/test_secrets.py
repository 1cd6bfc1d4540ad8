"""Where the value of a secret cannot be found while a process in a container uses it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from helmr import ids
from tests.docker.engines import Materialize, python
from worker.channel import ChannelProcess
from worker.docker_api import DockerApi
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import Output, ProcessSpec, SecretFile

pytestmark = [pytest.mark.docker, pytest.mark.anyio]

VALUE = "s3cr3t-of-the-first-machine"
_USE = """
import os, pathlib, subprocess
assert os.environ["TOKEN"] == pathlib.Path("/run/secrets/token").read_text()
holder = subprocess.Popen(["sleep", "60"])  # a child that has it in its environment block
print("up", flush=True)
holder.wait()
"""
#: Everything that this container shows: environments, command lines, and files of every file system but the kernel's own.
_SEARCH = """
import os, pathlib
value = "-".join(["s3cr3t", "of", "the", "first", "machine"]).encode()
places = list(pathlib.Path("/proc").glob("[0-9]*/environ")) + list(pathlib.Path("/proc").glob("[0-9]*/cmdline"))
for top in ("/run", "/tmp", "/helmr", "/dev/shm", os.getcwd()):
    places += [path for path in pathlib.Path(top).rglob("*") if path.is_file()]
for path in places:
    try:
        if value in path.read_bytes():
            print("found in", path)
    except OSError:
        pass
print("looked at", len(places))
"""


@pytest.fixture
async def user(materialize: Materialize) -> AsyncIterator[tuple[DockerMachine, ChannelProcess]]:
    """A machine, and a process in it that has the secret both ways and lives until the end of the test."""
    machine = await materialize()
    file = SecretFile(path="/run/secrets/token", value=VALUE)
    argv = ("python3", "-c", _USE)
    spec = ProcessSpec(id=ids.new("run"), kind="argv", argv=argv, secrets={"TOKEN": VALUE}, secret_files=(file,))
    process = await machine.start(spec)
    async for frame in process.frames():
        assert isinstance(frame, Output), frame
        if b"up" in frame.data:
            break
    yield machine, process
    await process.cancel(0)
    async for _ in process.frames():
        pass


async def test_not_in_what_the_engine_knows(user: tuple[DockerMachine, ChannelProcess], api: DockerApi) -> None:
    machine, _ = user
    known = await api.call(lambda client: client.inspect_container(machine.ref))
    top = await api.call(lambda client: client.top(machine.ref))
    changes = await api.call(lambda client: client.diff(machine.ref))
    assert VALUE not in json.dumps([known, top, changes])
    assert VALUE.encode() not in await api.call(lambda client: client.logs(machine.ref))


@pytest.mark.usefixtures("user")
async def test_not_on_the_disk_of_the_host(engine: DockerEngine) -> None:
    files = [path for path in engine._home.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if VALUE.encode() in path.read_bytes()] == []


@pytest.mark.usefixtures("user")
async def test_not_in_another_workspace(materialize: Materialize) -> None:
    other = await materialize()
    found = await python(other, _SEARCH)
    assert found.stderr == ""
    assert found.stdout.startswith("looked at ")


async def test_not_in_what_is_left_when_the_process_has_ended(user: tuple[DockerMachine, ChannelProcess]) -> None:
    machine, process = user
    assert "found in /run/secrets/token" in (await python(machine, _SEARCH)).stdout
    await process.cancel(0)
    async for _ in process.frames():
        pass
    found = await python(machine, _SEARCH)
    assert found.stdout.startswith("looked at ")


async def test_the_file_cannot_be_replaced_by_the_task(user: tuple[DockerMachine, ChannelProcess]) -> None:
    machine, _ = user
    tricks = "\n".join(
        f"try: {trick}\nexcept OSError as error: print(type(error).__name__)"
        for trick in (
            "os.unlink('/run/secrets/token')",
            "os.rename('/run/secrets/token', '/run/secrets/x')",
            "os.symlink('/etc/passwd', '/run/secrets/y')",
            "os.rename('/run/secrets', '/run/z')",
            "os.mkdir('/run/mine')",
        )
    )
    assert (await python(machine, f"import os\n{tricks}")).stdout.split() == ["PermissionError"] * 5
