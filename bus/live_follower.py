"""Keeps the live runs up to date: from a checkpoint on, so that millions of finished runs cost nothing, and then live.

The checkpoint is a position in the log and the sequences of the latest events of the runs that were live there. Any control
process may write it, and any checkpoint will do: whatever came after its position is read again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats

from bus import topology
from bus.live import FILTERS, LiveRuns
from bus.reader import StreamReader
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

_KEY = "live"
#: Runs a checkpoint names by sequence, at most: reading one costs what reading some 20 messages in a row costs.
MAX_NAMED = 10_000
#: Seconds between checkpoints, and the messages after which one is worth writing.
_SAVE_EVERY, _WORTH_SAVING = 10.0, 1000
#: Messages folded before others get a turn.
_TURN = 500
_READS = 64
_RETRY_DELAY = 0.5


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Everything beyond ``position`` is to be read; runs live there whose latest event stands before it are at ``named``."""

    created: str | None  #: when the stream was made
    position: int
    named: list[int]


def checkpoint(runs: LiveRuns, created: str | None, *, most: int = MAX_NAMED) -> Checkpoint:
    """A checkpoint of the present. With more than ``most`` live runs it begins before the events of the others."""
    named = heapq.nsmallest(
        most + 1, itertools.chain((run.seq for run in runs), (s.seq for s in runs.half_starts.values()))
    )
    position = runs.position if len(named) <= most else named.pop() - 1
    return Checkpoint(created=created, position=position, named=named)


class LiveFollower:
    """Feeds ``runs``; run :meth:`run` in a task of its own. ``ready`` is set once they are complete."""

    def __init__(self, nc: Nats, runs: LiveRuns) -> None:
        self.nc = nc
        self.runs = runs
        self.ready = asyncio.Event()
        self._arrived = asyncio.Event()
        self._saved = 0

    async def run(self) -> None:
        """Follow for ever.

        Raises:
            ConfigError: the log is not the one followed so far: an older copy was restored under us.
        """
        start = await self._load()
        self._saved = self.runs.position
        created = start.created if start else None
        reader = StreamReader(
            self.nc,
            topology.RUNS,
            reader="live",
            filters=FILTERS,
            after=self.runs.position,
            created=created,
            arrived=self._arrived.set,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reader.run())
            tasks.create_task(self._fold(reader))
            tasks.create_task(self._save(reader))

    async def _fold(self, reader: StreamReader) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := reader.take(_TURN):
                for message in batch:
                    self.runs.take(message.seq, message.subject, message.body)
                await asyncio.sleep(0)
            if reader.caught_up.is_set() and not self.ready.is_set():
                log.info("%s live runs as of #%s", len(self.runs), self.runs.position)
                self.ready.set()

    async def _save(self, reader: StreamReader) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY)
            if self.ready.is_set() and self.runs.position - self._saved >= _WORTH_SAVING:
                await self.save(reader.created)

    async def save(self, created: str | None) -> None:
        """Write a checkpoint of the present; that it does not work now does not matter."""
        point = checkpoint(self.runs, created)
        try:
            bucket = await self.nc.jetstream().key_value(topology.CHECKPOINTS_BUCKET)
            await bucket.put(_KEY, msgspec.json.encode(point))
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
            log.info("no checkpoint: %s %s", type(error).__name__, error)
        else:
            self._saved = self.runs.position

    async def _load(self) -> Checkpoint | None:
        """Take up the latest checkpoint, if there is one and it is of this log; tries until the server answers."""
        while True:
            try:
                point = await self._read()
                if point is not None:
                    await self._take_named(point)
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError, Unavailable) as error:
                log.info("reading the checkpoint again: %s %s", type(error).__name__, error)
                await asyncio.sleep(_RETRY_DELAY)  # the server is away
            else:
                return point

    async def _read(self) -> Checkpoint | None:
        js = self.nc.jetstream()
        try:
            entry = await (await js.key_value(topology.CHECKPOINTS_BUCKET)).get(_KEY)
            point = msgspec.json.decode(entry.value or b"", type=Checkpoint)
        except nats.js.errors.KeyNotFoundError:
            return None
        except msgspec.DecodeError as error:
            log.warning("the checkpoint of the live runs cannot be read, so the whole log is: %s", error)
            return None
        reader = StreamReader(self.nc, topology.RUNS, after=point.position, created=point.created, arrived=lambda: None)
        return point if await reader.fits() else None

    async def _take_named(self, point: Checkpoint) -> None:
        js = self.nc.jetstream()
        turns = asyncio.Semaphore(_READS)

        async def read(seq: int) -> tuple[int, str, bytes] | None:
            async with turns:
                try:
                    message = await js.get_msg(topology.RUNS, seq=seq, direct=True)
                except nats.js.errors.NotFoundError:
                    return None  # the run has ended meanwhile, and has been deleted
                return seq, message.subject or "", message.data or b""

        for found in await asyncio.gather(*(read(seq) for seq in point.named)):
            if found is not None:
                self.runs.take(*found)
        self.runs.position = point.position
