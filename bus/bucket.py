"""A live view of a key-value bucket that survives restarts of the server.

nats-py's watcher rides on an ordered consumer, which a restart of the server can leave silent. Here the bucket's subjects are
followed by a plain subscription, which the client renews by itself, and the whole bucket is read again after every reconnect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus import topology
from bus.requests import api
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

_LOAD_TIMEOUT = 10.0
_RETRY_DELAY = 0.5
#: Seconds between looks at the client's count of reconnects, for which nats-py has one callback only.
_LOOK = 1.0
_GONE = frozenset({"DEL", "PURGE"})


class BucketView:
    """Calls ``on_value(key, value)`` for all there is and all that comes; ``value`` is None for a key that was deleted."""

    def __init__(self, nc: Nats, bucket: str, on_value: Callable[[str, bytes | None], None]) -> None:
        self.nc = nc
        self.bucket = bucket
        self.ready = asyncio.Event()
        self._on_value = on_value
        self._prefix = topology.bucket_subject(bucket, "")

    async def watch(self) -> None:
        """Follow the bucket for ever; run in a task of its own."""
        subscription = await self.nc.subscribe(f"{self._prefix}>", cb=self._hear)
        try:
            while True:
                seen = self.nc.stats["reconnects"]
                await self._load()
                self.ready.set()
                while self.nc.stats["reconnects"] == seen:  # noqa: ASYNC110  # nobody offers an event, see _LOOK
                    await asyncio.sleep(_LOOK)
        finally:
            if not self.nc.is_closed:
                await subscription.unsubscribe()

    async def _hear(self, msg: Msg) -> None:
        deleted = (msg.headers or {}).get("KV-Operation") in _GONE
        self._on_value(msg.subject.removeprefix(self._prefix), None if deleted else msg.data)

    async def _load(self) -> None:
        """Read the whole bucket, trying until it works."""
        while True:
            try:
                async with asyncio.timeout(_LOAD_TIMEOUT):
                    await self._read_all()
            except (TimeoutError, nats.errors.Error, nats.js.errors.Error, Unavailable) as error:
                log.info("bucket %s: reading it again: %s %s", self.bucket, type(error).__name__, error)
                await asyncio.sleep(_RETRY_DELAY)  # the server is away
            else:
                return

    async def _read_all(self) -> None:
        """Key by key: nats-py's watcher can say "that was all" before the first value has arrived."""
        stream = f"KV_{self.bucket}"
        info = await api(self.nc, f"STREAM.INFO.{stream}", {"subjects_filter": f"{self._prefix}>"})
        if "error" in info:
            raise Unavailable(f"bucket {self.bucket}: {info['error'].get('description')}")
        js = self.nc.jetstream()
        for subject in info["state"].get("subjects") or {}:
            try:
                message = await js.get_last_msg(stream, subject)
            except nats.js.errors.NotFoundError:
                continue  # it has expired meanwhile
            deleted = (message.headers or {}).get("KV-Operation") in _GONE
            self._on_value(subject.removeprefix(self._prefix), None if deleted else message.data or b"")
