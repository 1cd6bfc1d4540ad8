"""The proxy: what goes in comes out, unless it is told otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import Proxy, proxied

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def _echo() -> AsyncIterator[Proxy]:
    """A proxy in front of a server that says everything back."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        async with proxied(server.sockets[0].getsockname()[1]) as proxy:
            yield proxy
    finally:
        server.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> bytes:
    writer.write(text)
    return await asyncio.wait_for(reader.read(1024), 5)


async def test_it_carries_what_is_said_both_ways() -> None:
    async with _echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await _ask(reader, writer, b"hello") == b"hello"
        proxy.delay = 0.05
        begin = asyncio.get_running_loop().time()
        assert await _ask(reader, writer, b"later") == b"later"
        assert asyncio.get_running_loop().time() - begin >= 0.1
        writer.close()


async def test_half_open_it_says_nothing_and_loses_nothing() -> None:
    async with _echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await _ask(reader, writer, b"one") == b"one"
        proxy.hold()
        writer.write(b"two")
        other = await asyncio.open_connection("127.0.0.1", proxy.port)
        other[1].write(b"three")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1024), 0.1)
        proxy.release()
        assert await asyncio.wait_for(reader.read(1024), 5) == b"two"
        assert await asyncio.wait_for(other[0].read(1024), 5) == b"three"
        writer.close()
        other[1].close()


async def test_cut_it_ends_connections_and_refuses_new_ones_until_it_is_healed() -> None:
    async with _echo() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await _ask(reader, writer, b"one") == b"one"
        proxy.refuse = True
        proxy.cut()
        with pytest.raises(ConnectionError):
            await _ask(reader, writer, b"two")
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionError):
            await _ask(reader, writer, b"three")
        proxy.heal()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await _ask(reader, writer, b"four") == b"four"
        writer.close()


async def test_it_hangs_up_when_the_server_is_away() -> None:
    async with _echo() as proxy:
        gone = proxy.port
    async with proxied(gone) as orphan:
        reader, writer = await asyncio.open_connection("127.0.0.1", orphan.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
