"""Carries what a run writes to the log stream: live, in order, in bounded memory, up to the run's log limit.

The first bytes leave at once; while publishes are under way, what follows is gathered into chunks of up to 64 KiB. When
too much is pending, :meth:`LogPump.write` waits, the supervisor's window fills, and the task blocks: back-pressure all the way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext

from helmr import chunks, events, subjects
from helmr.chunks import LogEnd
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Largest chunk, in bytes (DESIGN: 16 to 64 KiB).
CHUNK = 64 * 1024
#: Publishes under way at the same time.
_WINDOW = 8
#: Bytes waiting to be published before a writer has to wait.
_PENDING = 1024 * 1024
#: Log bytes of a run after which a tombstone takes the place of the rest (DESIGN: limits).
LIMIT = 64 * 1024**2
_TIMEOUT = 5.0
_RETRY_DELAY = 0.25
#: Seconds that are taken for what is under way when the writer is cancelled.
_SETTLE = 5.0


class _Chunk:
    __slots__ = ("at", "data", "frame", "number", "offset", "reached", "stream", "tombstone")

    def __init__(self, stream: str, offset: int, tombstone: str | None = None) -> None:
        self.stream = stream
        self.offset = offset
        self.data = bytearray()
        self.at: datetime = events.now()
        self.tombstone = tombstone
        self.number = 0
        self.frame = 0  #: of the process, whose bytes it begins with
        self.reached = (0, 0)  #: position and offset, as in a mark


class LogPump:
    """The log writer of one dispatch of one attempt; run :meth:`run` in a task of its own."""

    def __init__(
        self,
        js: JetStreamContext,
        scope: Scope,
        run_id: str,
        *,
        attempt: int,
        dispatch: int,
        limit: int = LIMIT,
        execution: int = 0,
        landed: Callable[[], None] = lambda: None,
    ) -> None:
        self._js = js
        self._scope = scope
        self._run_id = run_id
        self._attempt = attempt
        self._dispatch = dispatch
        self._limit = limit
        self._queue: deque[_Chunk] = deque()
        self._pending = 0
        self._offsets: dict[str, int] = {}
        self._stored = 0
        #: Streams of which something was left out.
        self._truncated: set[str] = set()
        self._closing = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._in_flight = 0
        self._stored_some = asyncio.Event()
        #: The cursor of the lease under which the process was started whose log this is.
        self.execution = execution
        #: What LOGS holds, without a gap, up to this sequence.
        self.landed = 0
        self._tell = landed
        #: Whether a successor could go on from what is stored, and from what the supervisor has.
        self._whole = True
        self._open: deque[_Chunk] = deque()
        self._numbers = itertools.count(1)
        self._reached: dict[str, tuple[int, int]] = {}
        self._frame = 0

    @property
    def oldest(self) -> int | None:
        """The first frame of the process of which something is not stored yet; None: there is none."""
        return self._open[0].frame if self._open else None

    def begin(self, ends: Mapping[str, LogEnd], *, truncated: Iterable[str] = (), landed: int = 0) -> None:
        """Go on where an earlier dispatch of the same execution has ended; what was ``truncated`` there stays so."""
        self._reached = {stream: (end.position, -end.skip) for stream, end in ends.items()}
        self._truncated |= set(truncated)
        self.landed = landed
        self._enqueue(_Chunk("log", 0))  # for the next one who has to find out

    def spoil(self) -> None:
        """Say in the log, before anything more is settled, that no successor can go on with this execution."""
        if self._whole:
            self._whole = False
            self._enqueue(_Chunk("log", self._offsets.get("log", 0)))

    def _enqueue(self, chunk: _Chunk) -> None:
        chunk.number, chunk.frame = next(self._numbers), self._frame
        chunk.reached = self._reached.get(chunk.stream, (0, 0))
        self._queue.append(chunk)
        self._open.append(chunk)
        self._changed.set()

    @property
    def totals(self) -> dict[str, Any]:
        """Bytes per stream, counting those beyond the limit, and whether there were any: for the terminal event."""
        streams = {name: self._offsets.get(name, 0) for name in ("stdout", "stderr", "log")}
        return streams | {"truncated": bool(self._truncated)}

    async def write(self, stream: str, data: bytes, *, position: int = 0, lag: int = 0, frame: int = 0) -> None:
        """Take bytes of one stream; waits while too much is pending.

        With them, all is here that the process said up to ``position`` (see :class:`helmr.chunks.Mark`), but for ``lag`` bytes
        that an earlier dispatch has stored beyond that; they come from its frame ``frame``, or later ones.
        """
        self._frame = frame
        offset = self._offsets.get(stream, 0)
        self._offsets[stream] = offset + len(data)
        if stream in self._truncated:
            return
        room = self._limit - self._stored
        self._stored += min(len(data), room)
        self._put(stream, offset, data[:room])
        self._reached[stream] = (position, self._offsets[stream] - lag)
        if self._queue and self._queue[-1].stream == stream:
            self._queue[-1].reached = self._reached[stream]
        if len(data) > room:
            self._truncated.add(stream)
            self.tombstone(chunks.TRUNCATED, stream)
        await self._room.wait()

    def note(self, line: bytes) -> None:
        """Add a line of the worker's own to the ``log`` stream, without waiting: these are few and short."""
        offset = self._offsets.get("log", 0)
        self._offsets["log"] = offset + len(line)
        position, _ = self._reached.get("log", (0, 0))
        self._put("log", offset, line)
        # Nobody could repeat half of it: it ends a chunk.
        self._reached["log"] = self._queue[-1].reached = (position, self._offsets["log"])

    def tombstone(self, cause: str, stream: str = "log") -> None:
        """Say in the log that it ends here before its time, and why."""
        offset = min(self._offsets.get(stream, 0), self._limit)
        self._enqueue(_Chunk(stream, offset, cause))

    def _put(self, stream: str, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            last = self._queue[-1] if self._queue else None
            if last is None or last.stream != stream or len(last.data) >= CHUNK or last.tombstone:
                last = _Chunk(stream, offset)
                self._enqueue(last)
            part = view[: CHUNK - len(last.data)]
            last.data += part
            offset += len(part)
            view = view[len(part) :]
        self._pending += len(data)
        if self._pending >= _PENDING:
            self._room.clear()
        self._changed.set()

    async def drain(self) -> None:
        """Wait until everything written is stored."""
        while self._queue or self._in_flight:
            self._stored_some.clear()
            await self._stored_some.wait()

    async def close(self) -> None:
        """Say that nothing more comes; :meth:`run` returns when everything is stored."""
        self._closing = True
        self._changed.set()

    async def run(self) -> None:
        """Publish until :meth:`close`, retrying for as long as it takes.

        Cancelled, as when the lease is lost, it lets go of what has not left yet, and stores what has.
        """
        try:
            await self._run()
        except asyncio.CancelledError:
            await self._settle()
            raise

    async def _settle(self) -> None:
        """Store what is under way, so that the log has no gap wherever it ends: a chunk can be lost, and those after it not.

        When the server does not answer for long it remains like that.
        """
        try:
            async with asyncio.timeout(_SETTLE):
                for chunk in [*self._open][: self._in_flight]:
                    await self._publish(chunk) or await self._publish_again(chunk)
        except TimeoutError:
            log.info("the log of %s may have a gap where its writer was stopped", self._run_id)

    async def _run(self) -> None:
        flying: deque[tuple[_Chunk, asyncio.Task[int]]] = deque()
        async with asyncio.TaskGroup() as publishes:
            while self._queue or flying or not self._closing:
                while self._queue and len(flying) < _WINDOW:
                    # Tasks start in the order they were made, so the chunks reach the server in order.
                    flying.append((self._queue[0], publishes.create_task(self._publish(self._queue[0]))))
                    self._in_flight += 1
                    self._queue.popleft()
                if flying:
                    await self._land(flying)
                else:
                    self._changed.clear()
                    await self._changed.wait()

    async def _land(self, flying: deque[tuple[_Chunk, asyncio.Task[int]]]) -> None:
        """Wait for the oldest chunk. If it was lost, nothing new leaves until it and all that left after it are stored."""
        lost = not await flying[0][1]
        for _ in range(len(flying) if lost else 1):
            chunk, task = flying.popleft()
            self._landed(chunk, await task or await self._publish_again(chunk))

    async def _publish_again(self, chunk: _Chunk) -> int:
        """Publish a chunk until it is known where LOGS has it; not at once: the server is away, or was."""
        stored = 0
        while not stored:
            await asyncio.sleep(_RETRY_DELAY)
            stored = await self._publish(chunk)
        return stored

    async def _publish(self, chunk: _Chunk) -> int:
        """Where LOGS has the chunk; 0: that it does is not known. Its message id makes a repeat harmless."""
        subject = subjects.log(self._scope, self._run_id, self._attempt, chunk.stream)
        position, reached = chunk.reached
        mark = chunks.Mark(
            execution=self.execution,
            position=position,
            offset=reached,
            number=chunk.number,
            landed=self.landed,
            whole=self._whole,
        )
        headers = chunks.headers(
            offset=chunk.offset, dispatch=self._dispatch, at=chunk.at, tombstone=chunk.tombstone, mark=mark
        )
        # Chunks of nothing carry a mark alone: several may stand at one place.
        name = f"{chunk.stream}{'!' if chunk.tombstone else '' if chunk.data else f'?{chunk.number}'}"
        headers["Nats-Msg-Id"] = chunks.message_id(self._run_id, self._attempt, self._dispatch, name, chunk.offset)
        try:
            ack = await self._js.publish(subject, bytes(chunk.data), timeout=_TIMEOUT, headers=headers)
        except (TimeoutError, OSError, nats.errors.Error, nats.js.errors.Error) as error:
            log.debug("log chunk of %s: %s; again", self._run_id, error)
            return 0
        return ack.seq

    def _landed(self, chunk: _Chunk, seq: int) -> None:
        self._open.popleft()
        self.landed = max(self.landed, seq)
        self._pending -= len(chunk.data)
        self._in_flight -= 1
        self._stored_some.set()
        if self._pending < _PENDING:
            self._room.set()
        self._tell()
