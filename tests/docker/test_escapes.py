"""A hostile task tries to break out, in a run like any other: everything it tries is refused, or yields nothing.

All attempts are made by one run (``escapes/attempts.py``), each is a test here; what they mean stands in
``docs/explanation/threat-model.md``.
"""

from __future__ import annotations

import re
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from helmr.client import AsyncClient
from helmr.models import Run
from tests.docker.careless import Careless, careless
from tests.docker.engines import docker_running
from tests.docker.escapes.attempts import ATTEMPTS
from tests.integration.platform import Platform

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

PROJECT = Path(__file__).parent / "escapes"
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "threat-model.md"
VALUE = "s3cr3t-of-another-run"


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Careless]:
    async with careless() as service:
        yield service


@pytest.fixture(scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    """A Helmr with one worker of the docker engine, which knows where NATS is as ``helmr worker`` does."""
    async with docker_running(tmp_path_factory.mktemp("home"), slots=4) as platform:
        yield platform


@pytest.fixture(scope="module")
async def client(platform: Platform) -> AsyncClient:
    client = await platform.client("escapes")
    await client.secrets.set("TOKEN", VALUE)
    await client.deployments.deploy(PROJECT)
    return client


async def _run(client: AsyncClient, task: str, payload: Any = None) -> Run:
    started = await client.sessions.start(task, payload)
    return await started.run.wait(timeout="100s")


@pytest.fixture(scope="module")
async def results(platform: Platform, client: AsyncClient, service: Careless) -> dict[str, str]:
    """What came of each attempt, made while a run in another workspace has a secret."""
    confidant = await client.sessions.start("confidant")
    async for chunk in client.runs.logs(confidant.run.id, follow=True):
        if chunk.data:
            assert VALUE.encode() not in chunk.data  # masked
            break
    facts = {
        "nats": int(platform.server.url.rpartition(":")[2]),
        "service": service.port,
        "hosts": [_own_address()],
        "home": str(platform.home),
        "secret_of_another": VALUE[::-1],
    }
    run = await _run(client, "escape", facts)
    await client.runs.cancel(confidant.run.id, force=True)
    assert (run.status, run.failure) == ("succeeded", None)
    results: dict[str, str] = run.output
    return results


def _own_address() -> str:
    """This host's address in the network it is on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.254", 9))
        return str(probe.getsockname()[0])


@pytest.mark.parametrize("name", sorted(ATTEMPTS))
async def test_an_attempt_fails(name: str, results: dict[str, str]) -> None:
    assert not results[name].startswith("GOT"), results[name]


async def test_each_attempt_fails_for_its_own_reason(results: dict[str, str], service: Careless) -> None:
    """Not for a mistake of the attempt: what the kernel and the proxy say is what a wall says."""
    says = re.compile(
        r"Permission|not permitted|not allowed|Read-only|No such|unreachable|space left|name resolution|in use|\b403\b"
    )
    told = {name: text for name, text in results.items() if text.startswith("refused")}
    assert [(name, text) for name, text in told.items() if not says.search(text)] == []
    assert service.connections == 0
    assert sorted(results) == sorted(ATTEMPTS)


async def test_the_page_names_every_attempt_and_every_test_it_names_exists() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert sorted(set(ATTEMPTS) - named) == []
    sources = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in sources or f"/{test}.py" in text, test


async def test_traps_in_a_workspace_catch_nobody(platform: Platform, client: AsyncClient) -> None:
    run = await _run(client, "trap")
    assert (run.status, run.output) == ("succeeded", 9)
    files = {each.path: each for each in await client.workspaces.files(run.workspace_id, recursive=True)}
    assert {name: each.target for name, each in files.items() if each.kind == "link"} == {
        "shadow": "/etc/shadow",
        "up": "../../..",
        "loop": "loop",
        "self": "/proc/self",
    }
    assert "pipe" not in files
    with pytest.raises(Exception, match="shadow"):
        _ = [data async for data in client.workspaces.read(run.workspace_id, "shadow")]
    copy = await client.workspaces.fork(run.workspace_id)
    again = await client.sessions.start(
        "escape", {"nats": 1, "service": 1, "hosts": ["127.0.0.1"]} | _NOWHERE, workspace=copy.id
    )
    assert (await again.run.wait(timeout="100s")).status == "succeeded"
    root = platform.home / "workspaces" / copy.id
    assert (root / "shadow").is_symlink()
    assert (root / "root").stat().st_uid != 0
    assert not (root / "root").stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    assert (root / "folder" / "file").read_text() == "plain"


_NOWHERE = {"home": "/nowhere", "secret_of_another": VALUE[::-1]}
