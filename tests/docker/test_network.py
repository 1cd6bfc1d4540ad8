"""What a machine reaches under each network policy: tried from inside, with nothing but what a task has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helmr import ids
from tests.docker.careless import Careless, careless
from tests.docker.engines import python
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.egress_rules import Neighbourhood
from worker.engine import ImageSpec, Limits, MachineSpec, Network

pytestmark = [pytest.mark.docker, pytest.mark.anyio]

#: Asks for each URL, and prints the status and what was said, by URL.
_FETCH = """
import json, urllib.error, urllib.request
answers = {}
for url in json.loads(%r):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            answers[url] = [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        answers[url] = [error.code, error.read().decode()]
    except OSError as error:
        answers[url] = [0, str(error)]
print(json.dumps(answers))
"""
#: Asks the proxy for a tunnel to each target, and prints the first line and the body of each answer, by target.
_TUNNEL = """
import json, socket
answers = {}
for target in %r:
    with socket.create_connection(("127.0.0.1", 3128), 30) as connection:
        connection.sendall(f"CONNECT {target} HTTP/1.1\\r\\n\\r\\n".encode())
        answers[target] = connection.recv(4096).decode()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
async def host() -> AsyncIterator[Careless]:
    async with careless() as host:
        yield host


@pytest.fixture(scope="module")
async def opened(tmp_path_factory: pytest.TempPathFactory, host: Careless) -> AsyncIterator[DockerEngine]:
    """An engine whose operator opens the one service of the host; without that nothing here could be reached at all."""
    opening = {"HELMR_EGRESS_ALLOW": f"127.0.0.1:{host.port}"}
    engine = DockerEngine(tmp_path_factory.mktemp("home"), Neighbourhood.of(opening))
    engine.guard((("localhost", 4222),))
    yield engine
    await engine.close()


async def _machine(engine: DockerEngine, network: Network) -> DockerMachine:
    image = await engine.ensure_image(ImageSpec(), print)
    limits = Limits(memory=128 * 1024**2, pids=64)
    spec = MachineSpec(workspace_id=ids.new("ws"), worker_id="wrk", image=image, network=network, limits=limits)
    return await engine.materialize(spec)


async def _fetch(machine: DockerMachine, *urls: str) -> dict[str, Any]:
    finished = await python(machine, _FETCH % json.dumps(urls))
    answers: dict[str, Any] = json.loads(finished.stdout)
    return answers


async def _tunnel(machine: DockerMachine, *targets: str) -> dict[str, str]:
    finished = await python(machine, _TUNNEL % (targets,))
    answers: dict[str, str] = json.loads(finished.stdout)
    return answers


async def test_internet_reaches_nothing_near_the_worker(engine: DockerEngine, host: Careless) -> None:
    machine = await _machine(engine, "internet")
    port = host.port
    host.asked.clear()
    near = (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"172.17.0.1:{port}",
        f"[::ffff:127.0.0.1]:{port}",
        f"0.0.0.0:{port}",
    )
    for target, answer in (await _tunnel(machine, *near)).items():
        assert answer.startswith("HTTP/1.1 403"), (target, answer)
    for answer in (await _tunnel(machine, "169.254.169.254:80", "metadata.google.internal:80")).values():
        assert not answer.startswith("HTTP/1.1 200"), answer
    status, text = (await _fetch(machine, url := "http://169.254.169.254/latest/meta-data/"))[url]
    assert (status, "not a public address" in text) == (403, True)
    assert host.asked == []
    await engine.delete(machine.workspace_id)


async def test_internet_reaches_what_is_open(opened: DockerEngine, host: Careless) -> None:
    machine = await _machine(opened, "internet")
    url = f"http://127.0.0.1:{host.port}/x"
    no_proxy = "import os; os.environ['no_proxy'] = ''\n"  # or it would look for that address in here
    finished = await python(machine, no_proxy + _FETCH % json.dumps([url]))
    assert json.loads(finished.stdout) == {url: [200, "hello"]}
    assert "NATS" in (await _tunnel(machine, "127.0.0.1:4222"))["127.0.0.1:4222"]
    await opened.delete(machine.workspace_id)


async def test_a_list_reaches_its_hosts_alone(opened: DockerEngine, host: Careless) -> None:
    machine = await _machine(opened, (f"localhost:{host.port}",))
    answers = await _tunnel(
        machine, f"localhost:{host.port}", f"127.0.0.1:{host.port}", "example.com:443", "1.1.1.1:443"
    )
    assert [answer.split()[1] for answer in answers.values()] == ["200", "403", "403", "403"]
    await opened.delete(machine.workspace_id)


async def test_the_way_out_belongs_to_the_supervisor(engine: DockerEngine) -> None:
    machine = await _machine(engine, "internet")
    code = """
import os, socket
for attempt in (
    lambda: socket.create_server(("127.0.0.1", 3128)),
    lambda: socket.socket(socket.AF_UNIX).connect("/helmr/run/way-out"),
    lambda: os.unlink("/helmr/run/way-out"),
):
    try: print("done", attempt())
    except OSError as error: print(type(error).__name__, error.errno)
"""
    finished = await python(machine, code)
    assert finished.stdout.split("\n")[:3] == ["OSError 98", "PermissionError 13", "PermissionError 13"]
    await engine.delete(machine.workspace_id)


async def test_without_a_network_there_is_no_way_out(engine: DockerEngine) -> None:
    machine = await _machine(engine, "none")
    finished = await python(
        machine,
        "import os, socket; print(os.environ.get('HTTPS_PROXY')); socket.create_connection(('127.0.0.1', 3128))",
    )
    assert finished.stdout == "None\n"
    assert "ConnectionRefusedError" in finished.stderr
    await engine.delete(machine.workspace_id)


async def test_machines_cannot_reach_each_other(engine: DockerEngine) -> None:
    one, two = await asyncio.gather(_machine(engine, "internet"), _machine(engine, "internet"))
    interfaces = [(await python(each, "import os; print(os.listdir('/sys/class/net'))")).stdout for each in (one, two)]
    namespaces = {
        (await python(each, "import os; print(os.readlink('/proc/self/ns/net'))")).stdout for each in (one, two)
    }
    assert (interfaces, len(namespaces)) == (["['lo']\n"] * 2, 2)
    for each in (one, two):
        await engine.delete(each.workspace_id)
