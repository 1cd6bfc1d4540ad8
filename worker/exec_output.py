"""Carries what an exec writes to whoever listens, and into a stream that keeps the latest part of it.

One publish does both: clients subscribe to the subject that the stream stores. When too much is pending,
:meth:`ExecOutput.write` waits, the supervisor's window fills, and the process blocks. Output that is not kept is published all
the same, and stored nowhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import nats.errors
import nats.js.errors

from bus import topology
from bus.log import Log
from helmr import subjects
from helmr.exec_frames import CHUNK, OFFSET
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Bytes of one exec's output that are kept: the latest (DESIGN: limits).
KEPT = 64 * 1024**2
#: Publishes under way at the same time.
_WINDOW = 8
#: Bytes waiting to be published before a writer has to wait.
_PENDING = 1024 * 1024
_TIMEOUT = 5.0
_RETRY_DELAY = 0.25


class _Chunk:
    __slots__ = ("data", "stream")

    def __init__(self, stream: str, offset: int) -> None:
        self.stream = stream
        self.data = bytearray(OFFSET.pack(offset))


class ExecOutput:
    """The output of one exec; run :meth:`run` in a task of its own."""

    def __init__(self, event_log: Log, scope: Scope, exec_id: str, *, kept: bool) -> None:
        self._log = event_log
        self._subjects = {
            stream: subjects.exec_output(scope, exec_id, stream, kept=kept) for stream in ("stdout", "stderr")
        }
        self._kept = kept
        self._queue: deque[_Chunk] = deque()
        self._pending = 0
        self.totals = {"stdout": 0, "stderr": 0}  #: bytes written so far
        self._stored: deque[tuple[int, int]] = deque()  #: sequence and size of what is kept, oldest first
        self._stored_bytes = 0
        self._closing = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def write(self, stream: str, data: bytes) -> None:
        """Take bytes of one stream; waits while too much is pending."""
        view = memoryview(data)
        while view:
            last = self._queue[-1] if self._queue else None
            if last is None or last.stream != stream or len(last.data) >= CHUNK:
                last = _Chunk(stream, self.totals[stream])
                self._queue.append(last)
            part = view[: CHUNK - len(last.data)]
            last.data += part
            self.totals[stream] += len(part)
            view = view[len(part) :]
        self._pending += len(data)
        if self._pending >= _PENDING:
            self._room.clear()
        self._changed.set()
        await self._room.wait()

    def close(self) -> None:
        """Say that nothing more comes; :meth:`run` returns when everything is out."""
        self._closing = True
        self._changed.set()

    async def run(self) -> None:
        """Publish until :meth:`close`, retrying what is kept for as long as it takes."""
        flying: deque[tuple[_Chunk, asyncio.Task[int]]] = deque()
        async with asyncio.TaskGroup() as publishes:
            while self._queue or flying or not self._closing:
                while self._queue and len(flying) < _WINDOW:
                    # Tasks start in the order they were made, so the chunks reach the server in order.
                    chunk = self._queue.popleft()
                    flying.append((chunk, publishes.create_task(self._publish(chunk))))
                if flying:
                    await self._land(flying)
                else:
                    self._changed.clear()
                    await self._changed.wait()

    async def _land(self, flying: deque[tuple[_Chunk, asyncio.Task[int]]]) -> None:
        """Wait for the oldest chunk. If it was lost, nothing new leaves until it and all that left after it are stored."""
        lost = await flying[0][1] < 0
        for _ in range(len(flying) if lost else 1):
            chunk, task = flying.popleft()
            seq = await task
            while seq < 0:
                await asyncio.sleep(_RETRY_DELAY)  # the server is away
                seq = await self._publish(chunk)
            await self._landed(chunk, seq)

    async def _publish(self, chunk: _Chunk) -> int:
        """The sequence under which the chunk is stored, 0 if it is not to be; -1: that is not known."""
        subject, body = self._subjects[chunk.stream], bytes(chunk.data)
        try:
            if not self._kept:
                await self._log.nc.publish(subject, body)
                return 0
            return (await self._log.js.publish(subject, body, timeout=_TIMEOUT)).seq
        except (TimeoutError, OSError, nats.errors.Error, nats.js.errors.Error) as error:
            log.debug("output %s: %s; again", subject, error)
            return -1

    async def _landed(self, chunk: _Chunk, seq: int) -> None:
        size = len(chunk.data)
        self._pending -= size - OFFSET.size
        if self._pending < _PENDING:
            self._room.set()
        if seq:
            self._stored.append((seq, size))
            self._stored_bytes += size
        while self._stored_bytes > KEPT:
            oldest, its_size = self._stored.popleft()
            self._stored_bytes -= its_size
            # One that stays costs room for a week, and nothing else.
            await self._log.delete(oldest, stream=topology.EXECS)
