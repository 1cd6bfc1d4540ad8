"""Fixtures every test may use: an event loop backend, a NATS server of one's own, and a look at what was left behind."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Heartbeats and deadlines of tests come more than twice as often; read when bus.topology is imported. Not more often than
# that: a busy machine must not look like a dead one.
os.environ.setdefault("HELMR_TEST_PACE", "0.4")

import pytest
from hypothesis import HealthCheck, settings
from nats.aio.client import Client as Nats

from bus.server import EmbeddedServer
from helmr.connection import connect
from tests import leaks

# A busy machine makes no test wrong.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

#: In the path of what lives longer than one test.
SHARED = "shared-helmr"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and so would every program that the tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary directory for this test process and its children, so that what is left in it is theirs."""
    folder = tmp_path_factory.mktemp("t")
    before = leaks.descendants()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    assert not leaks.left_running(before), "processes outlive the tests"
    assert not list(folder.iterdir()), "temporary files outlive the tests"


@pytest.fixture(autouse=True)
def nothing_left_behind(temporary_folder: Path) -> Iterator[None]:
    """Fails a test that leaves a process or a temporary folder of Helmr's."""
    processes, folders = leaks.descendants(spare=SHARED), set(temporary_folder.glob("helmr*"))
    yield
    assert not leaks.left_running(processes, spare=SHARED), "the test leaves processes"
    assert set(temporary_folder.glob("helmr*")) <= folders, "the test leaves temporary folders"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio is the event loop: nats-py knows no other."""
    return "asyncio"


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A running server over an empty store."""
    server = EmbeddedServer(tmp_path / "home", durability="relaxed")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def nats_url(nats_server: EmbeddedServer) -> str:
    """Where the server answers."""
    return nats_server.url


@pytest.fixture
async def nc(nats_url: str) -> AsyncIterator[Nats]:
    """A connection to the server."""
    client = await connect(nats_url, name="test")
    try:
        yield client
    finally:
        await client.close()
