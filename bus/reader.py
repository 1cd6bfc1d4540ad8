"""Reads one stream in order, from a sequence on, without acknowledgements: the watermark is the only position there is.

nats-py's ``fetch`` tops out near 20,000 messages a second and lingers when the server restarts. Here an ephemeral
consumer is pulled with overlapping requests, messages come by callback (five times that), and what counts as alive is
progress: when neither messages nor heartbeats come, or a message is missing in between, a new consumer takes over from
the last sequence received.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.requests import api
from helmr.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

#: Messages per pull request; two of them overlap.
_BATCH = 5000
#: Bytes per pull request, so that 64 KiB log chunks do not flood the connection.
_BATCH_BYTES = 8 * 1024**2
#: Beyond this much in hand nothing more is requested.
_HIGH_WATER = 20_000
_HIGH_WATER_BYTES = 48 * 1024**2
_EXPIRES = 5.0
_HEARTBEAT = 1.0
#: Seconds of silence after which the consumer is taken for lost: three heartbeats.
_SILENCE = 3.0
#: The server removes a consumer nobody has pulled from for this long.
_INACTIVE = 30.0
_NOT_FOUND = 10037


class Message(NamedTuple):
    """A stored message: its sequence, when it was stored (nanoseconds since 1970), and what it says."""

    seq: int
    subject: str
    stored_ns: int
    headers: dict[str, str] | None
    body: bytes


class _Lost(Exception):
    """This consumer will not go on; another must."""


class StreamReader:
    """Messages of ``stream`` beyond ``after``; :meth:`run` fills the buffer, :meth:`take` empties it.

    ``created`` is when the stream was made, if known: a stream of the same name made at another time is refused. With
    ``filters`` only messages under these subjects come. ``caught_up`` is set once nothing stored was left to be received.
    """

    def __init__(
        self,
        nc: Nats,
        stream: str,
        *,
        reader: str = "history",
        filters: Sequence[str] = (),
        after: int = 0,
        created: str | None = None,
        arrived: Callable[[], None],
    ) -> None:
        self.nc = nc
        self.stream = stream
        self.caught_up = asyncio.Event()
        self._reader = reader
        self._filters = list(filters)
        self.received = after
        self.created = created
        self.stored_ns = 0  #: when the last received message was stored
        self._arrived = arrived
        self._buffer: deque[Message] = deque()
        self._bytes = 0
        self._requested = 0
        self._expected = 1
        self._beats = 0
        self._heard = (-1, 0)
        self._pulse = asyncio.Event()
        self._broken: str | None = None
        self._generation = ""

    def __len__(self) -> int:
        return len(self._buffer)

    def take(self, limit: int) -> list[Message]:
        """Up to ``limit`` buffered messages."""
        taken = [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]
        self._bytes -= sum(len(message.body) for message in taken)
        self._pulse.set()
        return taken

    async def last(self) -> int:
        """The last sequence of the stream, whether or not its message still exists.

        Raises:
            Unavailable: no answer.
        """
        info = await api(self.nc, f"STREAM.INFO.{self.stream}", None)
        if "error" in info:
            hint = "if no server has run on this NATS yet, start one: it makes the streams"
            raise Unavailable(f"stream {self.stream}: {info['error']['description']}", hint=hint)
        return int(info["state"]["last_seq"])

    async def exhausted(self) -> bool:
        """Whether the stream holds nothing beyond what was received: later messages may all have been deleted."""
        return await self.stored_after(self.received) is None

    async def stored_after(self, seq: int) -> datetime | None:
        """When the first message beyond a sequence was stored; None if there is none.

        Raises:
            Unavailable: no answer.
        """
        answer = await api(self.nc, f"STREAM.MSG.GET.{self.stream}", {"seq": seq + 1, "next_by_subj": ">"})
        if "error" not in answer:
            return datetime.fromisoformat(answer["message"]["time"])
        if answer["error"].get("err_code") != _NOT_FOUND:
            raise Unavailable(f"stream {self.stream}: {answer['error']['description']}")
        return None

    async def run(self) -> None:
        """Receive for ever.

        Raises:
            ConfigError: the stream is not the one that was read before.
        """
        while True:
            try:
                await self._consume()
            except (_Lost, Unavailable, nats.errors.Error, OSError) as error:
                log.info("%s: reading again from #%s: %s", self.stream, self.received + 1, error)
                await asyncio.sleep(0.2)  # the server is away; there is no event for its return on this path

    async def check(self) -> None:
        """See that the stream is the one that was read before, and no older copy of it.

        Raises:
            ConfigError: it is not.
            Unavailable: it does not exist, or nobody answers.
        """
        info = await api(self.nc, f"STREAM.INFO.{self.stream}", None)
        if "error" in info:
            raise Unavailable(f"stream {self.stream}: {info['error']['description']}")
        created, last = str(info["created"]), int(info["state"]["last_seq"])
        if self.received > last:
            raise _refusal(
                self._reader,
                f"stream {self.stream} ends at #{last}, but the {self._reader} has applied #{self.received} of it",
            )
        if self.created is not None and self.created != created:
            raise _refusal(
                self._reader,
                f"stream {self.stream} was made at {created}; the {self._reader} is of one made at {self.created}",
            )
        self.created = created

    async def fits(self) -> bool:
        """Whether the stream is the one that was read before; as :meth:`check`, for those that can begin anew."""
        try:
            await self.check()
        except ConfigError as error:
            log.warning("%s", error)
            return False
        return True

    async def _consume(self) -> None:
        await self.check()
        # An inbox per consumer: what a former one still sends must not be taken for this one's.
        inbox = self.nc.new_inbox()
        self._generation, self._broken = inbox, None
        self._requested, self._expected = 0, 1
        self._heard = (-1, 0)
        consumer = f"{self._reader}-{secrets.token_hex(6)}"
        subscription = await self.nc.subscribe(
            f"{inbox}.*",
            cb=functools.partial(self._receive, inbox),
            pending_msgs_limit=1_000_000,
            pending_bytes_limit=512 * 1024**2,
        )
        try:
            await self._create(consumer)
            await self._pull_on(consumer, inbox)
        finally:
            self._generation = ""
            await self._forget(subscription.unsubscribe(), consumer)

    async def _forget(self, unsubscribed: object, consumer: str) -> None:
        try:
            await unsubscribed  # type: ignore[misc]
            await self.nc.publish(f"$JS.API.CONSUMER.DELETE.{self.stream}.{consumer}")
        except (nats.errors.Error, OSError) as error:  # the connection is gone; the server forgets by itself
            log.debug("%s: %s", consumer, error)

    async def _create(self, name: str) -> None:
        config: dict[str, Any] = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.received + 1,
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": int(_INACTIVE * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        if self._filters:
            config["filter_subjects"] = self._filters
        body = {"stream_name": self.stream, "config": config, "action": "create"}
        answer = await api(self.nc, f"CONSUMER.CREATE.{self.stream}.{name}", body)
        if "error" in answer:
            raise Unavailable(f"cannot read stream {self.stream}: {answer['error']['description']}")
        if answer["num_pending"] == 0:
            self._catch_up()

    async def _pull_on(self, consumer: str, inbox: str) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{consumer}"
        body = {
            "batch": _BATCH,
            "max_bytes": _BATCH_BYTES,
            "expires": int(_EXPIRES * 1e9),
            "idle_heartbeat": int(_HEARTBEAT * 1e9),
        }
        request = json.dumps(body).encode()
        turn = 0
        while self._broken is None:
            if self._wants_more():
                turn += 1
                self._requested += _BATCH
                await self.nc.publish(subject, request, reply=f"{inbox}.{turn}")
            await self._wait()
        raise _Lost(self._broken)

    def _wants_more(self) -> bool:
        full = len(self._buffer) >= _HIGH_WATER or self._bytes >= _HIGH_WATER_BYTES
        return self._requested <= _BATCH // 2 and not full

    async def _wait(self) -> None:
        """Until something changes; silence while a request is open means that the consumer is gone."""
        try:
            async with asyncio.timeout(_SILENCE):
                await self._pulse.wait()
        except TimeoutError:
            if self._requested > 0 and self._heard == (self._beats, self.received):
                self._broken = f"nothing heard for {_SILENCE:g} s"
        self._heard = (self._beats, self.received)
        self._pulse.clear()

    async def _receive(self, generation: str, msg: Msg) -> None:
        if generation != self._generation:
            return
        if not msg.reply:
            self._status(msg.headers or {})
            return
        tokens = msg.reply.split(".")
        at = 4 if len(tokens) == 9 else 6
        seq, order = int(tokens[at + 1]), int(tokens[at + 2])
        if order != self._expected or self._broken:
            self._broken = self._broken or f"message {self._expected} of this consumer is missing"
            self._pulse.set()
            return
        self._expected += 1
        self._requested -= 1
        self.received, self.stored_ns = seq, int(tokens[at + 3])
        self._buffer.append(Message(seq, msg.subject, self.stored_ns, msg.headers, msg.data))
        self._bytes += len(msg.data)
        if self._requested <= _BATCH // 2:
            self._pulse.set()
        if tokens[at + 4] == "0" and not self.caught_up.is_set():
            self._catch_up()
        # Every message costs: whoever waits is told of the first, and of every so many more.
        elif len(self._buffer) & 255 == 1:
            self._arrived()

    def _catch_up(self) -> None:
        self.caught_up.set()
        self._arrived()

    def _status(self, headers: dict[str, str]) -> None:
        """A heartbeat, or the end of a request, which tells how many messages of it were not sent."""
        self._beats += 1
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            return
        if status in {"408", "409"} and "Nats-Pending-Messages" in headers and "Deleted" not in description:
            self._requested = max(0, self._requested - int(headers["Nats-Pending-Messages"]))
        else:
            self._broken = f"{status} {description}"
        self._pulse.set()


def _refusal(reader: str, message: str) -> ConfigError:
    hint = "connect to the log that was read before (HELMR_URL, HELMR_HOME), or start this part again"
    if reader == "history":
        hint = (
            "connect to the log this history was made from (HELMR_URL, HELMR_HOME); or, to give up what only the history "
            "still knows, move history.db and logs/ away, and it is made anew from the log"
        )
    return ConfigError(f"{message}: the log is another one, or an older copy was restored", hint=hint)
