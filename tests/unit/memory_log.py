"""The log in memory: compare-and-set over a list, so that the code above it can be tested without a server."""

from __future__ import annotations

from typing import Any

from nats.js import JetStreamContext
from nats.js.api import PubAck, RawStreamMsg
from nats.js.errors import NotFoundError

from bus import topology
from bus.log import Log
from bus.stored import Superseded
from helmr import subjects

_EXPECT_SEQ = "Nats-Expected-Last-Subject-Sequence"
_EXPECT_FILTER = "Nats-Expected-Last-Subject-Sequence-Subject"


class NoLogs(JetStreamContext):
    """Takes log chunks and forgets them."""

    def __init__(self) -> None:
        """Without a connection."""

    async def publish(self, *_: Any, **__: Any) -> PubAck:
        """As if it were stored."""
        return PubAck(stream="LOGS", seq=1)

    async def get_msg(self, *_: Any, **__: Any) -> RawStreamMsg:
        """Nothing is there."""
        raise NotFoundError


class MemoryLog(Log):
    """The real reading and appending, on a list of messages instead of a stream."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.beside: list[str] = []  #: the subjects of what is no event
        self._patience = 0.0
        self.js = NoLogs()

    async def _publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        if _EXPECT_SEQ not in headers:
            self.beside.append(subject)
            return len(self.beside)
        expected, wanted = int(headers[_EXPECT_SEQ]), headers[_EXPECT_FILTER]
        assert subject.startswith(wanted.removesuffix(">")), "a filter that does not cover the subject checks nothing"
        last = await self._get(wanted)
        if (last[0] if last else 0) != expected:
            raise Superseded("another event came first")
        self.messages.append((subject, body))
        return len(self.messages)

    async def delete(self, seq: int, *, stream: str = topology.RUNS) -> None:
        """What was stored here stays."""

    async def _get(self, subject: str, *, after: int | None = None) -> tuple[int, bytes] | None:
        prefix = subject.removesuffix(">")
        assert prefix.startswith(subjects.ALL_EVENTS.removesuffix(">"))
        found = [(n, body) for n, (name, body) in enumerate(self.messages, start=1) if name.startswith(prefix)]
        if after is None:
            return found[-1] if found else None
        return next((item for item in found if item[0] > after), None)
