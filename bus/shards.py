"""Works on deliveries side by side, and on those about one entity one after the other, in the order they came.

A reaction is a handful of reads and appends, each a journey to the server and a sync to its disk: taken one at a time, ten
thousand wake-ups would wait for one another's journeys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from zlib import crc32

import nats.errors

from bus.pull import Delivery

log = logging.getLogger(__name__)

#: Entities worked on at the same time, and deliveries in hand for each shard before no more are taken.
WIDTH, _DEPTH = 16, 4


class Shards:
    """The queues of :func:`sharded`."""

    def __init__(self, work: Callable[[Delivery], Awaitable[None]], width: int) -> None:
        self._work = work
        self._queues: list[asyncio.Queue[Delivery]] = [asyncio.Queue(_DEPTH) for _ in range(width)]
        self._in_hand: dict[str, Delivery] = {}

    async def put(self, key: str, item: Delivery) -> None:
        """Have an item worked on, after all earlier ones of the same key; waits while too many are in hand."""
        self._in_hand[item.msg.reply] = item
        await self._queues[crc32(key.encode()) % len(self._queues)].put(item)

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Begin to work, in these tasks."""
        return [tasks.create_task(self._follow(queue)) for queue in self._queues]

    async def _follow(self, queue: asyncio.Queue[Delivery]) -> None:
        while True:
            item = await queue.get()
            await self._work(item)
            del self._in_hand[item.msg.reply]

    async def give_back(self) -> None:
        """Let all that is in hand be delivered again at once, to whoever asks."""
        for item in self._in_hand.values():
            try:
                await item.msg.nak()
            except nats.errors.Error as error:  # the server is away: it will deliver them again by itself
                log.debug("nak: %s", error)


@asynccontextmanager
async def sharded(work: Callable[[Delivery], Awaitable[None]], *, width: int = WIDTH) -> AsyncIterator[Shards]:
    """Work on what is put for the length of a block; what is not done at its end is given back.

    Raises:
        ExceptionGroup: with what ``work`` or the block raised; nothing more is worked on then.
    """
    shards = Shards(work, width)
    try:
        async with asyncio.TaskGroup() as tasks:
            working = shards.start(tasks)
            yield shards
            for task in working:
                task.cancel()
    finally:
        await shards.give_back()
