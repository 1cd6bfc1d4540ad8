"""Which workers are alive: each renews a key of its own, and everybody else watches.

A key that is not renewed counts as gone after :data:`bus.topology.PRESENCE_TTL` seconds, by the watcher's own clock: the
bucket tells nobody when a key expires.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.kv import KeyValue

from bus import topology

log = logging.getLogger(__name__)


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says about itself."""

    id: str
    host: str
    group: str
    engine: str
    isolated: bool
    slots: int
    running: int
    started_at: datetime
    version: str


async def announce(nc: Nats, info: WorkerInfo) -> None:
    """Say that the worker is alive; raises what nats-py raises when the server is away."""
    bucket = await nc.jetstream().key_value(topology.PRESENCE_BUCKET)
    await bucket.put(info.id, msgspec.json.encode(info))


async def withdraw(nc: Nats, worker_id: str) -> None:
    """Say that the worker is gone."""
    bucket = await nc.jetstream().key_value(topology.PRESENCE_BUCKET)
    await bucket.purge(worker_id)


class Presence:
    """A live view of the workers; run :meth:`watch` in a task of its own."""

    def __init__(self, nc: Nats) -> None:
        self.nc = nc
        self._seen: dict[str, tuple[float, WorkerInfo]] = {}
        self._started = time.monotonic()
        self.ready = asyncio.Event()

    @property
    def settled(self) -> bool:
        """Whether we have listened long enough to call a worker dead that we have not heard of."""
        return time.monotonic() - self._started > topology.PRESENCE_TTL + topology.HEARTBEAT

    def alive(self) -> dict[str, WorkerInfo]:
        """The workers heard of within the time to live, by id."""
        horizon = time.monotonic() - topology.PRESENCE_TTL
        return {key: info for key, (at, info) in self._seen.items() if at > horizon}

    def is_alive(self, worker_id: str) -> bool:
        """Whether this worker was heard of within the time to live."""
        return worker_id in self.alive()

    async def watch(self) -> None:
        """Follow the bucket for ever; starts over when the watch breaks."""
        while True:
            try:
                bucket = await self.nc.jetstream().key_value(topology.PRESENCE_BUCKET)
                await self._follow(bucket)
            except (TimeoutError, nats.errors.Error, nats.js.errors.Error) as error:
                log.info("presence: starting over: %s", error)
                await asyncio.sleep(0.5)  # the server is away; there is no event for its return on this path

    async def _follow(self, bucket: KeyValue) -> None:
        watcher = await bucket.watchall()
        try:
            async for entry in watcher:
                if entry is None:
                    self.ready.set()
                elif entry.value and entry.operation is None:
                    info = msgspec.json.decode(entry.value, type=WorkerInfo)
                    self._seen[entry.key] = (time.monotonic(), info)
                else:
                    self._seen.pop(entry.key, None)
        finally:
            await watcher.stop()
