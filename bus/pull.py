"""Our own pull loop over a durable consumer.

nats-py's ``fetch`` lingers when the server restarts under it, and a cancelled one leaves its request open, so that the server
goes on delivering to nobody. Here a request expires after at most five seconds, an answer that stays away is noticed, and
leaving the loop unsubscribes its inbox.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import NamedTuple, Self

import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus.requests import api
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

#: Seconds a pull request stays open at the server.
EXPIRES = 5.0
#: Seconds between signs of life of an open request, and the silence after which it is taken for lost.
HEARTBEAT = 1.0
_SILENCE = 2.5
_NO_MESSAGES, _REQUEST_ENDED, _HEARTBEAT = "404", "408", "100"


class Delivery(NamedTuple):
    """A message of a consumer, with what its reply subject tells."""

    msg: Msg
    stream_seq: int
    delivered: int
    pending: int


def delivery(msg: Msg) -> Delivery:
    """Parse ``$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>[.<token>]``."""
    tokens = msg.reply.split(".")
    start = 2 if len(tokens) == 9 else 4
    return Delivery(msg, int(tokens[start + 3]), int(tokens[start + 2]), int(tokens[start + 6]))


class Puller:
    """Pulls from one durable consumer; an async context manager."""

    def __init__(self, nc: Nats, stream: str, consumer: str) -> None:
        self.nc = nc
        self.stream = stream
        self.consumer = consumer
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = nc.new_inbox()
        self._queue: asyncio.Queue[Msg] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._request = 0

    async def __aenter__(self) -> Self:
        self._subscription = await self.nc.subscribe(f"{self._inbox}.*", cb=self._queue.put)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._subscription is not None:
            try:
                await self._subscription.unsubscribe()
                await self._return_unread()
            except nats.errors.Error as error:  # the connection is closed or draining: nothing is left to undo
                log.debug("unsubscribe: %s", error)

    async def _return_unread(self) -> None:
        """Let others have at once what was delivered and not looked at."""
        while not self._queue.empty():
            msg = self._queue.get_nowait()
            if msg.reply.startswith("$JS.ACK."):
                await msg.nak()

    async def pull(self, batch: int) -> AsyncIterator[Delivery]:
        """Up to ``batch`` messages, as they come; ends early when the request expires or the server goes away.

        Raises:
            Unavailable: the consumer does not exist (any more).
        """
        self._request += 1
        inbox = f"{self._inbox}.{self._request}"
        request = {"batch": batch, "expires": int(EXPIRES * 1e9), "idle_heartbeat": int(HEARTBEAT * 1e9)}
        try:
            await self.nc.publish(self._next, json.dumps(request).encode(), reply=inbox)
        except nats.errors.Error as error:
            raise Unavailable(f"cannot pull from {self.consumer}: {error}") from error
        left = batch
        while left:
            try:
                async with asyncio.timeout(_SILENCE):
                    msg = await self._queue.get()
            except TimeoutError:
                return  # lost with a restart of the server; the next request finds out more
            status = (msg.headers or {}).get("Status") if not msg.data else None
            if status is None:
                left -= 1
                yield delivery(msg)
            elif msg.subject == inbox and status != _HEARTBEAT:
                self._check(msg, status)
                return

    def _check(self, msg: Msg, status: str) -> None:
        description = (msg.headers or {}).get("Description", "")
        if status == "409" and "Deleted" in description:
            raise Unavailable(f"consumer {self.consumer} was deleted")
        if status == "503":
            raise Unavailable(f"consumer {self.consumer} does not answer")
        if status not in {_NO_MESSAGES, _REQUEST_ENDED, "409"}:
            log.warning("pull from %s ended: %s %s", self.consumer, status, description)


async def ensure_consumer(nc: Nats, stream: str, config: dict[str, object]) -> None:
    """Create a durable consumer, or leave it as it is.

    Raises:
        Unavailable: the server refuses.
    """
    name = config["durable_name"]
    body = {"stream_name": stream, "config": config, "action": ""}
    answer = await api(nc, f"CONSUMER.CREATE.{stream}.{name}", body)
    if "error" in answer:
        raise Unavailable(f"cannot create consumer {name}: {answer['error']['description']}")
