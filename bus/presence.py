"""Which workers are alive: each renews a key of its own, and everybody else watches.

A key that is not renewed counts as gone after :data:`bus.topology.PRESENCE_TTL` seconds in which the watcher was awake and
the server answered it: the bucket tells nobody when a key expires, and who slept or was cut off has no right to call others
silent. Before anything is taken from a worker, :meth:`Presence.confirm_gone` has the server's word for it, too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from datetime import datetime

import msgspec
from nats.aio.client import Client as Nats

from bus import topology
from bus.attention import Attention
from bus.bucket import BucketView
from bus.requests import api
from bus.stored import get_message
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

#: Seconds since the server's last sign of life in which it counts as being there.
_HEARD_WITHIN = topology.HEARTBEAT / 2


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
    draining: bool = False  #: takes nothing new, and ends when what it runs has ended
    full: bool = False  #: takes nothing new until its disk has room again
    engine_problem: str = ""  #: why its engine cannot be used: it takes nothing new until it can
    beat: int = 0  #: counts its announcements

    @property
    def obstacle(self) -> str:
        """What keeps it from taking anything new, for a person to read; empty if nothing does."""
        return "its disk is almost full" if self.full else self.engine_problem

    @property
    def takes_runs(self) -> bool:
        """Whether it takes anything new."""
        return not (self.draining or self.obstacle)

    @property
    def condition(self) -> str:
        """Why it takes nothing new, in a word or two for a column; empty if it does."""
        if self.draining:
            return "draining"
        return "disk almost full" if self.full else "engine away" if self.engine_problem else ""

    @property
    def told(self) -> str:
        """The same for a sentence, with the obstacle in full."""
        drains = ["draining"] if self.draining else []
        return ", ".join([*drains, f"takes nothing new: {self.obstacle}"] if self.obstacle else drains)


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

    def __init__(self, nc: Nats, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.nc = nc
        self._js = nc.jetstream()
        self._seen: dict[str, tuple[float, WorkerInfo]] = {}
        self._view = BucketView(nc, topology.PRESENCE_BUCKET, self._on_value)
        self._attention = Attention(clock)
        self._connections = nc.stats["reconnects"]
        self._answered = time.monotonic()
        self._undisturbed_since = 0.0
        self.ready = self._view.ready
        #: Set when a worker has said good-bye, or was found to be gone; for one listener, who clears it.
        self.departed = asyncio.Event()

    @property
    def settled(self) -> bool:
        """Whether we have listened long enough, without an interruption, to know who is gone."""
        return self._now() - self._undisturbed_since > topology.PRESENCE_TTL

    def alive(self) -> dict[str, WorkerInfo]:
        """The workers heard of within the time to live, by id."""
        horizon = self._now() - topology.PRESENCE_TTL
        return {key: info for key, (at, info) in self._seen.items() if at > horizon}

    def is_alive(self, worker_id: str) -> bool:
        """Whether this worker was heard of within the time to live."""
        return worker_id in self.alive()

    def workers(self, lane: str) -> list[WorkerInfo]:
        """The workers that take runs from a lane."""
        alive = self.alive().values()
        return [w for w in alive if not w.draining and lane in {w.group, f"~{w.host}", f"@{w.id}"}]

    def silences(self) -> dict[str, float]:
        """Seconds since each worker was heard of, by id; those that are gone are among them until somebody clears them away."""
        now = self._now()
        return {key: now - at for key, (at, _) in self._seen.items()}

    def give_up(self, worker_id: str) -> None:
        """Count a worker as gone until it is heard of again."""
        if worker_id in self._seen:
            self._seen[worker_id] = (-math.inf, self._seen[worker_id][1])

    async def confirm_gone(self, worker_id: str) -> bool:
        """Whether the server has heard no more of a worker that looks gone than we have: our view may lag behind.

        Raises:
            Unavailable: the server does not answer.
        """
        if self.is_alive(worker_id):
            return False
        subject = topology.bucket_subject(topology.PRESENCE_BUCKET, worker_id)
        found = await get_message(self._js, f"KV_{topology.PRESENCE_BUCKET}", subject, direct=False)
        if found is None or not found[1]:  # expired, or withdrawn: a marker is left
            return True
        known = self._seen.get(worker_id)
        if known is not None and known[1] == msgspec.json.decode(found[1], type=WorkerInfo):
            return True  # it will expire any moment
        self._on_value(worker_id, found[1])
        return False

    async def watch(self) -> None:
        """Follow the bucket for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._view.watch())
            tasks.create_task(self._attention.keep(self._now))
            tasks.create_task(self._knock())

    async def _knock(self) -> None:
        """Ask the server for a sign of life, for ever: one that hangs keeps its connections, and renews nobody's key."""
        while True:
            try:
                await api(self.nc, "INFO", None, timeout=2.0)
                self._answered = time.monotonic()
            except Unavailable as error:
                log.debug("%s", error)
            await asyncio.sleep(_HEARD_WITHIN / 2)

    @property
    def _listening(self) -> bool:
        return self.nc.is_connected and time.monotonic() - self._answered < _HEARD_WITHIN

    def forgive(self) -> None:
        """Give everybody a new term: the server did not answer us, so that others may not have reached it either."""
        now = self._attention.seconds(listening=self._listening)
        self._undisturbed_since = now
        self._seen = {key: (now, info) for key, (_, info) in self._seen.items()}

    def _now(self) -> float:
        """Seconds for which we have listened. While the server was away nobody could renew anything."""
        if self.nc.stats["reconnects"] != self._connections:
            self._connections = self.nc.stats["reconnects"]
            self.forgive()
        return self._attention.seconds(listening=self._listening)

    def _on_value(self, key: str, value: bytes | None) -> None:
        if value is None:
            self._seen.pop(key, None)
            self.departed.set()
        else:
            self._seen[key] = (self._now(), msgspec.json.decode(value, type=WorkerInfo))
