"""A proxy in front of NATS for one part, or of the engine, which can delay, hold back and cut what the two say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_CHUNK = 64 * 1024


class Proxy:
    """Forwards connections to a port, or a unix socket; what is wrong with it at the moment is set from outside.

    * ``delay``: seconds that everything takes longer, either way.
    * :meth:`hold`: connections stay, and are accepted, but nothing gets through any more: half-open. What was said meanwhile
      arrives at :meth:`release`, unless the connection was cut.
    * :meth:`cut`: every connection ends at once, what was under way is lost; with ``refuse`` new ones end as well.
    """

    def __init__(self, target: int | Path) -> None:
        self._target = target
        self.delay = 0.0
        self.refuse = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Where the part connects to."""
        return f"nats://127.0.0.1:{self.port}"

    async def start(self, at: Path | None = None) -> None:
        """Listen on a port of its own, or on the socket ``at``."""
        if at is not None:
            self._server = await asyncio.start_unix_server(self._accept, at)
            return
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def hold(self) -> None:
        """Let nothing through any more."""
        self._flowing.clear()

    def release(self) -> None:
        """Let everything through again."""
        self._flowing.set()

    def cut(self) -> None:
        """End every connection."""
        for pipe in self._pipes:
            pipe.cancel()

    def heal(self) -> None:
        """Be a good proxy."""
        self.delay, self.refuse = 0.0, False
        self.release()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if self.refuse or task is None:
            writer.transport.abort()
            return
        self._pipes.add(task)
        try:
            await self._join(reader, writer)
        except asyncio.CancelledError:
            return  # cut: nobody but us may cancel this task
        finally:
            self._pipes.discard(task)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            upstream = await self._connect()
        except OSError:
            return  # the server is away
        try:
            ways = [
                asyncio.ensure_future(self._carry(reader, upstream[1])),
                asyncio.ensure_future(self._carry(upstream[0], writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
        finally:
            upstream[1].transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection("127.0.0.1", self._target)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def proxied(target: int | Path, *, at: Path | None = None) -> AsyncIterator[Proxy]:
    """A proxy for the length of a block."""
    proxy = Proxy(target)
    await proxy.start(at)
    try:
        yield proxy
    finally:
        await proxy.close()
