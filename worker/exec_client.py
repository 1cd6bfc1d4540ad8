"""The client that steers an exec, as the worker sees it: its input by offset, how far it has read, whether it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import nats.errors
from nats.aio.client import Client as Nats

from bus import topology
from helmr import exec_frames, subjects
from helmr.exec_frames import INPUT_WINDOW, OUTPUT_WINDOW, Attach, Credit, Displaced
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Seconds without a word from the client after which the server is asked whether anybody listens there, and how often in a row
#: it must say no: a connection that broke comes back in between.
_SILENCE = topology.HEARTBEAT
_STRIKES = 2
_ANSWER_TIMEOUT = 1.0


#: The scope and id of an exec.
Place = tuple[Scope, str]


class InputBuffer:
    """The input of an exec: bytes by offset, without gaps, passed on to the process as soon as there is one."""

    def __init__(self) -> None:
        self.received = 0
        self.taken = 0
        self.ended = False
        self._early: list[bytes] = []
        self._feed: Callable[[bytes], None] = self._early.append
        self._end: Callable[[], None] | None = None

    def connect(self, feed: Callable[[bytes], None], end: Callable[[], None]) -> None:
        """Pass everything on from now on, beginning with what came early."""
        self._feed = feed
        for data in self._early:
            feed(data)
        self._early.clear()
        self._end = end
        if self.ended:
            end()

    def put(self, offset: int, data: bytes) -> bool:
        """Take bytes; what was seen before is dropped. False if something is missing before them, or it is too much."""
        if offset > self.received or offset + len(data) > self.taken + INPUT_WINDOW or self.ended:
            return self.ended
        fresh = data[self.received - offset :]
        if fresh:
            self.received += len(fresh)
            self._feed(fresh)
        return True

    def end(self, offset: int) -> bool:
        """Take the end; False if something is missing before it."""
        if offset != self.received:
            return False
        if not self.ended:
            self.ended = True
            if self._end is not None:
                self._end()
        return True

    def credit(self, *, again: bool = False) -> Credit:
        """How far it is."""
        return Credit(self.received, self.taken, again, self.ended)


class ExecClient:
    """Who steers the exec; run :meth:`run` in a task of its own. ``gone`` is called when a client has vanished."""

    def __init__(
        self, nc: Nats, place: Place, client: str | None, buffer: InputBuffer, gone: Callable[[], None]
    ) -> None:
        self._nc = nc
        self._place = place
        self._buffer = buffer
        self._gone = gone
        self._client = client
        self._read = 0  #: bytes of output that it is done with
        self._heard = asyncio.get_running_loop().time()
        self._again = False
        self._news = asyncio.Event()
        self._moved = asyncio.Event()

    @property
    def client(self) -> str | None:
        """Its token; None while nobody is there."""
        return self._client

    async def attach(self, frame: Attach) -> None:
        """This one steers from now on; the one before is told."""
        self._hear()
        if frame.client != self._client:
            before, self._client = self._client, frame.client
            self._read = 0
            if before is not None:
                await self._say(before, Displaced())
        self.acknowledge(frame.client, frame.stdout + frame.stderr)

    def leave(self) -> None:
        """Nobody steers any more; the output goes on without anybody waiting for it."""
        self._client = None
        self._moved.set()

    def acknowledge(self, client: str, read: int) -> None:
        """It is done with so many bytes of output."""
        if client == self._client:
            self._hear()
            self._read = max(self._read, read)
            self._moved.set()

    def tell(self, *, again: bool = False) -> None:
        """Have it told how far its input is."""
        self._again = self._again or again
        self._news.set()

    async def has_room(self, written: Callable[[], int]) -> None:
        """Wait while it lags too far behind what was written."""
        while self._client is not None and written() - self._read >= OUTPUT_WINDOW:
            self._moved.clear()
            await self._moved.wait()

    async def run(self) -> None:
        """Tell it what there is to tell, and look after it, for ever."""
        strikes = 0
        while True:
            try:
                async with asyncio.timeout(_SILENCE):
                    await self._news.wait()
            except TimeoutError:
                strikes = strikes + 1 if await self._is_gone() else 0
                if strikes >= _STRIKES:
                    log.info("exec %s: its client is gone", self._place[1])
                    self._gone()
                    return
                continue
            self._news.clear()
            again, self._again = self._again, False
            if self._client is not None:
                await self._say(self._client, self._buffer.credit(again=again))

    def _hear(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    async def _is_gone(self) -> bool:
        """Whether the client has been silent, and the server knows of nobody who listens to what is said to it."""
        silent = asyncio.get_running_loop().time() - self._heard >= _SILENCE
        if self._client is None or not silent or not self._nc.is_connected:
            return False
        subject = subjects.exec_client(*self._place, self._client)
        try:
            await self._nc.request(subject, exec_frames.encode(self._buffer.credit()), timeout=_ANSWER_TIMEOUT)
        except nats.errors.NoRespondersError:
            return True
        except (TimeoutError, nats.errors.Error):
            return False  # it is there, and busy; or the server is away
        self._hear()
        return False

    async def _say(self, client: str, frame: Credit | Displaced) -> None:
        try:
            await self._nc.publish(subjects.exec_client(*self._place, client), exec_frames.encode(frame))
        except (nats.errors.Error, OSError) as error:
            log.debug("exec %s: %s", self._place[1], error)  # the client asks again
