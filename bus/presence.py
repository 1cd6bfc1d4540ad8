"""Which workers are alive: each renews a key of its own, and everybody else watches.

A key that is not renewed counts as gone after :data:`bus.topology.PRESENCE_TTL` seconds, by the watcher's own clock: the
bucket tells nobody when a key expires.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import msgspec
from nats.aio.client import Client as Nats

from bus import topology
from bus.bucket import BucketView


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
        self._seen: dict[str, tuple[float, WorkerInfo]] = {}
        self._view = BucketView(nc, topology.PRESENCE_BUCKET, self._on_value)
        self._undisturbed_since = time.monotonic()
        self.ready = self._view.ready

    @property
    def settled(self) -> bool:
        """Whether we have listened long enough, without an interruption, to know who is gone."""
        return time.monotonic() - self._undisturbed_since > topology.PRESENCE_TTL + topology.HEARTBEAT

    def alive(self) -> dict[str, WorkerInfo]:
        """The workers heard of within the time to live, by id."""
        horizon = time.monotonic() - topology.PRESENCE_TTL
        return {key: info for key, (at, info) in self._seen.items() if at > horizon}

    def is_alive(self, worker_id: str) -> bool:
        """Whether this worker was heard of within the time to live."""
        return worker_id in self.alive()

    async def watch(self) -> None:
        """Follow the bucket for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._view.watch())
            tasks.create_task(self._forgive_interruptions())

    async def _forgive_interruptions(self) -> None:
        """While the server was away nobody could renew anything."""
        while True:
            await self._view.reconnected.wait()
            self._view.reconnected.clear()
            self.forgive()

    def forgive(self) -> None:
        """Give everybody a new term: the server did not answer us, so that others may not have reached it either."""
        now = time.monotonic()
        self._undisturbed_since = now
        self._seen = {key: (now, info) for key, (_, info) in self._seen.items()}

    def _on_value(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._seen.pop(key, None)
        else:
            self._seen[key] = (time.monotonic(), msgspec.json.decode(value, type=WorkerInfo))
