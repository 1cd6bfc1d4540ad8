"""Moves the log into the database: readers fill buffers, and one loop per database writes them in batches.

A batch is written at once when the projector has been idle, else at most every fifth of a second, every tenth when there is
much to write, and earlier when it is full or when somebody waits for an answer that includes what they have just done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nats.aio.client import Client as Nats

from bus import topology, watermark
from bus.reader import StreamReader
from bus.watermark import Watermark
from helmr import events
from helmr.errors import TimedOut, Unavailable, cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus.reader import Message
    from store.history_store import HistoryStore, Sink
    from store.steps import Prepared

log = logging.getLogger(__name__)

#: Messages per transaction, at most.
BATCH = 5000
#: Seconds from one transaction to the next, at least, while messages keep coming: a transaction costs some 15 ms of
#: processor time however few rows it has.
PACE = 0.2
#: The same once so many messages wait: beside what these cost, the transaction does not count.
MANY, MANY_PACE = 500, 0.1
#: On a busy machine transactions take longer. They are to take a third of a lane's time, as long as that is no more than
#: this many seconds from one to the next: runs come before their history.
SHARE, MAX_PACE = 3.0, 1.0
#: Seconds a reader waits for the projection to catch up with the log.
FRESHNESS_DEADLINE = 5.0

#: Seconds from one published watermark to the next, at least.
WATERMARK_PACE = 1.0

HISTORY_STREAMS = (topology.RUNS, topology.SESSIONS, topology.CONFIG)
#: Not the configuration: the watermark itself is part of it.
PUBLISHED_STREAMS = (topology.RUNS, topology.SESSIONS, topology.LOGS)


class Lane:
    """One database and the streams that go into it."""

    def __init__(self, nc: Nats, sink: Sink, streams: Iterable[str], settled: Callable[[], None]) -> None:
        self.sink = sink
        self._settled = settled
        self.readers = {
            stream: StreamReader(
                nc,
                stream,
                after=sink.applied.get(stream, 0),
                created=sink.created.get(stream),
                arrived=self._arrived,
            )
            for stream in streams
        }
        self.applied = {stream: sink.applied.get(stream, 0) for stream in self.readers}
        #: Held while a batch is written: whoever holds it sees the files at rest, between two transactions.
        self.commit = asyncio.Lock()
        self._work = asyncio.Event()
        self._hurry = asyncio.Event()
        self._moved = asyncio.Event()
        self._waiting = 0
        self._enough = BATCH  #: messages that end the present wait
        #: Seconds that the last two transactions took: one long one is a checkpoint, two are a busy machine.
        self._spent: deque[float] = deque([0.0], maxlen=2)

    async def check(self) -> None:
        """See that the streams are those the database was made from (:meth:`StreamReader.check`)."""
        for stream, reader in self.readers.items():
            await reader.check()
            if reader.created is not None:
                self.sink.created[stream] = reader.created

    async def run(self) -> None:
        """Write batches for ever; an error of the database ends it."""
        async with asyncio.TaskGroup() as tasks:
            for reader in self.readers.values():
                tasks.create_task(reader.run())
            prepared: asyncio.Queue[Prepared] = asyncio.Queue(1)
            tasks.create_task(self._prepare(prepared))
            tasks.create_task(self._store(prepared))

    async def _prepare(self, prepared: asyncio.Queue[Prepared]) -> None:
        """Python makes the rows of the next batch while DuckDB, outside the interpreter's lock, writes the last one."""
        began = 0.0
        while True:
            await self._work.wait()
            pace = min(max(PACE, SHARE * min(self._spent)), MAX_PACE)
            await self._linger(began + MANY_PACE, BATCH)
            await self._linger(began + pace, MANY)
            began = time.monotonic()
            await prepared.put(await asyncio.to_thread(self.sink.prepare, self._take()))

    async def _store(self, prepared: asyncio.Queue[Prepared]) -> None:
        while True:
            rows = await prepared.get()
            async with self.commit:
                began = time.monotonic()
                # A batch that has been begun is finished: cancelling the wait must not leave a thread behind.
                write = asyncio.ensure_future(asyncio.to_thread(self.sink.store, rows))
                try:
                    await asyncio.shield(write)
                except asyncio.CancelledError:
                    await write
                    raise
            self._spent.append(time.monotonic() - began)
            self._settle()

    def _arrived(self) -> None:
        self._work.set()
        if self._urgent(self._enough):
            self._hurry.set()

    def _urgent(self, enough: int) -> bool:
        return self._waiting > 0 or sum(map(len, self.readers.values())) >= enough

    async def _linger(self, until: float, enough: int) -> None:
        """Wait, in monotonic time, unless ``enough`` messages are there or somebody waits for them."""
        seconds = until - time.monotonic()
        if seconds <= 0 or self._urgent(enough):
            return
        self._enough = enough
        self._hurry.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return

    def _take(self) -> dict[str, list[Message]]:
        left, batch = BATCH, {}
        for stream, reader in self.readers.items():
            batch[stream] = reader.take(left)
            left -= len(batch[stream])
        if not any(map(len, self.readers.values())):
            self._work.clear()
        return batch

    def _settle(self) -> None:
        self.applied = {stream: self.sink.applied.get(stream, 0) for stream in self.readers}
        self._moved.set()
        self._moved = asyncio.Event()
        self._settled()

    async def fresh(self, deadline: float) -> None:
        """Return once everything the streams held at the call is applied; ``deadline`` is in loop time.

        Raises:
            TimedOut: it was not, in time.
        """
        self._waiting += 1
        self._hurry.set()
        try:
            async with asyncio.timeout_at(deadline):
                for stream, reader in self.readers.items():
                    await self._reach(stream, reader, await reader.last())
        except TimeoutError:
            lag = {stream: reader.received for stream, reader in self.readers.items()}
            raise TimedOut(
                "the history has not caught up with the log yet",
                hint="ask again in a moment, or without freshness",
                details={"applied": self.applied, "received": lag},
            ) from None
        finally:
            self._waiting -= 1

    async def _reach(self, stream: str, reader: StreamReader, last: int) -> None:
        still = True
        while self.applied[stream] < last:
            moved = self._moved
            # Asked only where nothing moves: while there is much to fold, a busy server is slow to answer.
            if still and reader.received < last and await reader.exhausted():
                last = reader.received  # the rest has been deleted
                continue
            try:
                async with asyncio.timeout(0.5):
                    await moved.wait()
                still = False
            except TimeoutError:
                still = True


class Projector:
    """The two lanes over an open store: history and logs."""

    def __init__(self, nc: Nats, store: HistoryStore) -> None:
        self.nc = nc
        self.store = store
        self._progress = asyncio.Event()
        self.history = Lane(nc, store.history, HISTORY_STREAMS, self._progress.set)
        self.logs = Lane(nc, store.logs, (topology.LOGS,), self._progress.set)

    async def check(self) -> None:
        """Refuse a log that is not the one the history was made from.

        Raises:
            ConfigError: it is not.
        """
        await self.history.check()
        await self.logs.check()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Project for the length of the block; an error of either lane ends the block.

        Raises:
            Exception: that error, or the block's own; of several at once, the one to tell people.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                work = (self.history.run(), self.logs.run(), self._publish())
                running = [tasks.create_task(part) for part in work]
                try:
                    yield
                finally:
                    for part in running:
                        part.cancel()
        except ExceptionGroup as group:
            raise cause(group) from group

    async def _publish(self) -> None:
        """Tell how far the history is (:mod:`bus.watermark`), whenever that has changed, at most once a second."""
        told: dict[str, int] = {}
        while True:
            self._progress.clear()
            applied = {stream: (self.history.applied | self.logs.applied)[stream] for stream in PUBLISHED_STREAMS}
            if applied != told and await self._told(applied):
                told = applied
            await asyncio.sleep(WATERMARK_PACE)
            await self._progress.wait()

    async def _told(self, applied: dict[str, int]) -> bool:
        try:
            await watermark.publish(self.nc, Watermark(streams=applied, at=events.now()))
        except Unavailable as error:  # the next batch tries again
            log.info("%s", error.message)
            return False
        return True

    async def fresh(self, *, logs: bool = False, timeout: float = FRESHNESS_DEADLINE) -> None:  # noqa: ASYNC109
        """Return once everything stored before the call is applied, logs included if wanted.

        Raises:
            TimedOut: not within ``timeout`` seconds.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        await self.history.fresh(deadline)
        if logs:
            await self.logs.fresh(deadline)
