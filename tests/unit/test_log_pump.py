"""The log writer against a server that comes and goes."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any, cast

import pytest
from nats.errors import ConnectionClosedError
from nats.js.api import PubAck

from helmr.chunks import HEADER_MARK, HEADER_OFFSET, LogChunk, LogEnd, Mark, parse
from helmr.subjects import Scope
from worker import log_pump
from worker.log_pump import LogPump

pytestmark = pytest.mark.anyio


class _Stream:
    """Stores what it is sent, unless it fails, in which case it may have stored it all the same; knows repeats by id."""

    def __init__(self, failures: float = 0.0, seed: int = 0) -> None:
        self.stored: list[LogChunk] = []
        self.marks: list[Mark] = []
        self.pending = 0
        self.most = 0
        self._ids: set[str] = set()
        self._failures = failures
        self._random = random.Random(seed)  # noqa: S311

    async def publish(self, subject: str, data: bytes, *, timeout: float, headers: dict[str, str]) -> PubAck:  # noqa: ARG002, ASYNC109
        self.pending += 1
        self.most = max(self.most, self.pending)
        await asyncio.sleep(0)
        self.pending -= 1
        lost = self._random.random() < self._failures
        if (not lost or self._random.random() < 0.5) and headers["Nats-Msg-Id"] not in self._ids:
            self._ids.add(headers["Nats-Msg-Id"])
            self.marks.append(Mark.parse(headers[HEADER_MARK]))
            self.stored.append(parse(subject, headers, data, seq=len(self.stored) + 1))
        if lost:
            raise ConnectionClosedError
        return PubAck("LOGS", len(self.stored))

    def text(self, stream: str) -> bytes:
        found = sorted((c for c in self.stored if c.stream == stream and not c.tombstone), key=lambda c: c.offset)
        assert all(a.offset + len(a.data) == b.offset for a, b in itertools.pairwise(found))
        return b"".join(chunk.data for chunk in found)


def _pump(stream: _Stream, **options: Any) -> LogPump:
    return LogPump(cast("Any", stream), Scope("acme", "dev"), "run_1", attempt=1, dispatch=1, **options)


async def _write(pump: LogPump, parts: list[tuple[str, bytes]]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(pump.run())
        for name, data in parts:
            await pump.write(name, data)
        await pump.drain()
        await pump.close()


async def test_small_writes_are_gathered_and_large_ones_cut() -> None:
    stream = _Stream()
    await _write(_pump(stream), [("stdout", b"x")] * 1000 + [("stdout", b"y" * 300_000)])
    assert stream.text("stdout") == b"x" * 1000 + b"y" * 300_000
    assert len(stream.stored) < 20
    assert max(len(chunk.data) for chunk in stream.stored) == log_pump.CHUNK


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_lost_or_doubled_and_little_is_late(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pump, "_RETRY_DELAY", 0)
    stream = _Stream(failures=0.2, seed=seed)
    parts = [(name, f"{name} {n}\n".encode()) for n in range(200) for name in ("stdout", "stderr")]
    await _write(_pump(stream), parts)
    for name in ("stdout", "stderr"):
        assert stream.text(name) == b"".join(data for stream_name, data in parts if stream_name == name)
    offsets = [chunk.offset for chunk in stream.stored if chunk.stream == "stdout"]
    late = [sum(1 for before in offsets[:n] if before > offset) for n, offset in enumerate(offsets)]
    assert max(late) < 8, "a lost chunk may be behind those that were under way with it, and no others"
    assert stream.most <= 8


async def test_beyond_the_limit_each_stream_gets_a_tombstone() -> None:
    stream = _Stream()
    pump = _pump(stream, limit=100)
    await _write(pump, [("stdout", b"a" * 80), ("stderr", b"b" * 30), ("stdout", b"c" * 50), ("stdout", b"d")])
    assert stream.text("stdout") == b"a" * 80
    assert stream.text("stderr") == b"b" * 20
    assert sorted(c.stream for c in stream.stored if c.tombstone) == ["stderr", "stdout"]
    assert pump.totals == {"stdout": 131, "stderr": 30, "log": 0, "truncated": True}


async def test_a_writer_waits_while_too_much_is_pending() -> None:
    pump = _pump(_Stream())
    first = asyncio.create_task(pump.write("stdout", b"x" * (2 * 1024 * 1024)))
    await asyncio.sleep(0.01)
    assert not first.done()
    running = asyncio.create_task(pump.run())
    await first
    await pump.close()
    await running


async def test_that_nobody_can_go_on_is_stored_where_another_mark_stands_already() -> None:
    stream = _Stream()
    pump = _pump(stream, execution=2)
    pump.begin({"log": LogEnd(7)})
    async with asyncio.TaskGroup() as group:
        group.create_task(pump.run())
        await pump.drain()
        pump.spoil()
        await pump.drain()
        await pump.close()
    assert [mark.whole for mark in stream.marks] == [True, False]


class _Forgetful(_Stream):
    """Forgets one chunk the first time, and stores those after it."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self._offset = offset
        self.forgot = asyncio.Event()

    async def publish(self, subject: str, data: bytes, *, timeout: float, headers: dict[str, str]) -> PubAck:  # noqa: ASYNC109
        if int(headers[HEADER_OFFSET]) == self._offset and not self.forgot.is_set():
            await asyncio.sleep(0)
            self.forgot.set()
            raise ConnectionClosedError
        return await super().publish(subject, data, timeout=timeout, headers=headers)


async def test_a_log_that_is_cancelled_ends_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_pump, "_RETRY_DELAY", 0.001)
    stream = _Forgetful(log_pump.CHUNK)
    pump = _pump(stream)
    await pump.write("stdout", b"x" * 12 * log_pump.CHUNK)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(pump.run())
        await stream.forgot.wait()
        running.cancel()
    assert 2 * log_pump.CHUNK <= len(stream.text("stdout")) < 12 * log_pump.CHUNK
    assert pump.totals["stdout"] == 12 * log_pump.CHUNK
