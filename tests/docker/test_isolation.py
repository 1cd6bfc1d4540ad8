"""What a machine is made of: a user without rights, and limits that hold. ``test_escapes.py`` is the attack on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docker.engines import Materialize, python, run
from worker.docker_api import DockerApi
from worker.docker_machine import DockerMachine
from worker.engine import Message, ProcessSpec

pytestmark = [pytest.mark.docker, pytest.mark.anyio]


@pytest.fixture(scope="module")
async def machine(materialize: Materialize) -> DockerMachine:
    return await materialize(network="none", memory=128 * 1024**2)


async def test_a_task_is_nobody_in_particular(machine: DockerMachine) -> None:
    code = "import os; print(os.getresuid(), os.getresgid(), os.getgroups()); print(open('/proc/self/status').read())"
    finished = await python(machine, code)
    assert finished.stdout.splitlines()[0] == "(1000, 1000, 1000) (1000, 1000, 1000) []"
    status = dict(line.split(":\t", 1) for line in finished.stdout.splitlines()[1:] if ":\t" in line)
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


async def test_what_programs_need_is_allowed(machine: DockerMachine) -> None:
    code = """
import asyncio, multiprocessing, pathlib, socket, ssl, subprocess, sqlite3, tempfile, threading
assert subprocess.run(["sh", "-c", "echo a | cat"], capture_output=True, check=True).stdout == b"a\\n"
with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
with tempfile.TemporaryDirectory() as folder:
    script = pathlib.Path(folder, "x"); script.write_text("#!/bin/sh\\necho b"); script.chmod(0o755)
    assert subprocess.run([script], capture_output=True, check=True).stdout == b"b\\n"
    sqlite3.connect(pathlib.Path(folder, "db")).execute("create table t (x)")
server = socket.create_server(("127.0.0.1", 0)); socket.create_connection(server.getsockname()).close()
async def main(): assert await (await asyncio.create_subprocess_exec("true")).wait() == 0
asyncio.run(main()); print("fine")
"""
    finished = await python(machine, code)
    assert (finished.stdout, finished.stderr) == ("fine\n", "")


async def test_only_the_loopback_interface_exists_without_a_network(machine: DockerMachine) -> None:
    assert (await run(machine, "ls", "/sys/class/net")).stdout.split() == ["lo"]


async def test_a_fork_bomb_is_contained_and_ended(machine: DockerMachine) -> None:
    bomb = """
import os, sys
while True:
    try: os.fork()
    except OSError as error: print(error.errno, file=sys.stderr); break
while True:
    try: os.fork()
    except OSError: pass
"""
    finished = await python(machine, bomb, deadline=1.0, grace=0.2)
    assert finished.exited.cause == "deadline"
    assert "11" in finished.stderr.split()  # EAGAIN
    assert (await run(machine, "echo", "alive")).stdout == "alive\n"


async def test_a_memory_hog_is_killed_alone(machine: DockerMachine) -> None:
    finished = await python(machine, "print('x', flush=True); hog = bytearray(512 * 1024**2)")
    assert (finished.exited.oom, finished.exited.signal, finished.stdout) == (True, 9, "x\n")
    finished = await run(machine, "echo", "alive")
    assert (finished.exited.oom, finished.stdout) == (False, "alive\n")


async def test_secrets_are_not_in_what_the_engine_knows(machine: DockerMachine, api: DockerApi) -> None:
    finished = await run(machine, "sh", "-c", "echo $TOKEN", secrets={"TOKEN": "s3cr3t-value"})
    assert finished.stdout == "s3cr3t-value\n"
    known = await api.call(lambda client: client.inspect_container(machine.ref))
    assert "s3cr3t-value" not in json.dumps(known)
    assert b"s3cr3t-value" not in await api.call(lambda client: client.logs(machine.ref))


async def test_the_container_is_what_was_asked_for(machine: DockerMachine, api: DockerApi) -> None:
    host = (await api.call(lambda client: client.inspect_container(machine.ref)))["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in host["CapAdd"]} == {"SETUID", "SETGID", "KILL", "CHOWN"}
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (128 * 1024**2, 128 * 1024**2, 64)
    assert (host["NetworkMode"], host["Privileged"], host.get("Init")) == ("none", False, None)
    assert [option.partition("=")[0] for option in host["SecurityOpt"]] == ["no-new-privileges:true", "seccomp"]


_TEMPLATE = """
import ctypes, os
from helmr import task
BORN = os.getpid()

@task("probe")
def probe() -> dict:
    parent, refused = os.getppid(), []
    if ctypes.CDLL(None).ptrace(16, parent, 0, 0) == -1:  # PTRACE_ATTACH
        refused.append("ptrace")
    for name in ("mem", "environ", "fd"):
        try:
            os.open(f"/proc/{parent}/{name}", os.O_RDONLY)
        except PermissionError:
            refused.append(name)
    status = open(f"/proc/{parent}/status").read()
    uids = status.partition("Uid:")[2].split()[:4]
    return {"forked": parent == BORN, "refused": refused, "uids": uids, "own": os.listdir("/proc/self/fd") != []}
"""


async def test_a_template_is_as_weak_as_a_task_and_out_of_its_reach(machine: DockerMachine, tmp_path: Path) -> None:
    (tmp_path / "probing.py").write_text(_TEMPLATE)
    await machine.put_source("probing", tmp_path)
    for number in range(2):
        order: dict[str, object] = {"module": "probing", "task_id": "probe", "payload": None, "ctx": {}}
        process = await machine.start(ProcessSpec(id=f"probe{number}", source="probing", task=order))
        messages = [frame.body async for frame in process.frames() if isinstance(frame, Message)]
        assert messages[-1]["output"] == {
            "forked": True,
            "refused": ["ptrace", "mem", "environ", "fd"],
            "uids": ["1000"] * 4,
            "own": True,
        }
