"""Pulls dispatch messages from the lanes a worker serves, as fast as it has slots for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import nats.errors
from nats.aio.client import Client as Nats

from bus import topology
from bus.pull import Delivery, Puller, ensure_consumer
from bus.requests import api
from helmr.errors import HelmrError

log = logging.getLogger(__name__)

_RETRY_DELAY = 0.5


class Slots:
    """How many runs a worker executes at a time.

    A message that was pulled claims a slot at once, so that no more is pulled than fits; as every lane pulls for itself,
    more than fits can arrive all the same, and then waits for its turn in :meth:`enter`.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.claimed = 0
        self.active = 0
        self._changed = asyncio.Event()

    @property
    def free(self) -> int:
        """Slots nobody has claimed."""
        return max(self.total - self.claimed, 0)

    def claim(self) -> None:
        """Claim a slot for a message that has arrived."""
        self.claimed += 1

    def occupy(self) -> None:
        """Claim and take a slot for a run that is being executed already, whether one is free or not."""
        self.claimed += 1
        self.active += 1

    async def enter(self) -> None:
        """Wait for the claimed slot to be really free."""
        while self.active >= self.total:
            self._changed.clear()
            await self._changed.wait()
        self.active += 1

    def leave(self, *, entered: bool) -> None:
        """Give the slot up."""
        self.claimed -= 1
        self.active -= entered
        self._changed.set()

    async def wait_free(self) -> None:
        """Return when a slot is free to claim."""
        while self.free == 0:
            self._changed.clear()
            await self._changed.wait()


class Lane:
    """One lane; :meth:`run` hands each message to ``take`` while ``gate`` is set."""

    def __init__(
        self, nc: Nats, name: str, slots: Slots, gate: asyncio.Event, take: Callable[[Delivery], None]
    ) -> None:
        self._nc = nc
        self.name = name
        self._slots = slots
        self._gate = gate
        self._take = take

    async def create(self) -> None:
        """Make sure that the lane's consumer exists."""
        await ensure_consumer(self._nc, topology.RUNS, topology.lane_consumer(self.name).as_dict())

    async def run(self) -> None:
        """Pull for ever; starts over when the server was away or the consumer is gone."""
        while True:
            try:
                await self.create()
                async with Puller(self._nc, topology.RUNS, topology.lane_consumer_name(self.name)) as puller:
                    while True:
                        await self._gate.wait()
                        await self._slots.wait_free()
                        async for item in puller.pull(self._slots.free):
                            self._take(item)
            except (HelmrError, nats.errors.Error) as error:
                log.info("lane %s: starting over: %s", self.name, error)
                await asyncio.sleep(_RETRY_DELAY)  # the server is away


async def remove_lane(nc: Nats, name: str) -> None:
    """Remove the consumer of a lane that nobody will serve again, if nothing is left in it."""

    consumer = topology.lane_consumer_name(name)
    info = await api(nc, f"CONSUMER.INFO.{topology.RUNS}.{consumer}", None)
    if "error" not in info and info["num_pending"] == 0 and info["num_ack_pending"] == 0:
        await api(nc, f"CONSUMER.DELETE.{topology.RUNS}.{consumer}", None)
