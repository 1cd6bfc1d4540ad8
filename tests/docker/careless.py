"""What a careless program of the host offers on all interfaces: a server that greets everybody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Careless:
    """Notes who connects and what is asked."""

    def __init__(self) -> None:
        self.connections = 0
        self.asked: list[bytes] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):  # who only connects has asked nothing
            self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()


@asynccontextmanager
async def careless() -> AsyncIterator[Careless]:
    """One such server, for the length of a block."""
    host = Careless()
    server = await asyncio.start_server(host.serve, "0.0.0.0", 0)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()
