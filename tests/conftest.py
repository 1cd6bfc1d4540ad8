"""Fixtures every test may use: an event loop backend, and a NATS server of one's own on an ephemeral port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats

from bus.connection import connect
from bus.server import EmbeddedServer


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
