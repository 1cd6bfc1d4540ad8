"""The worker's side of an exec's input: bytes by offset, in whatever way they arrive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from helmr import exec_frames, ids
from helmr.exec_frames import INPUT_WINDOW, OUTPUT_WINDOW, Attach, Credit, Displaced
from helmr.subjects import Scope
from worker.exec_client import ExecClient, InputBuffer

pytestmark = pytest.mark.anyio


class _Process:
    def __init__(self) -> None:
        self.fed = b""
        self.ends = 0

    def feed(self, data: bytes) -> None:
        self.fed += data

    def end(self) -> None:
        self.ends += 1


def test_what_comes_early_waits_for_the_process() -> None:
    buffer, process = InputBuffer(), _Process()
    assert buffer.put(0, b"one ")
    assert buffer.put(4, b"two")
    assert buffer.end(7)
    buffer.connect(process.feed, process.end)
    assert (process.fed, process.ends) == (b"one two", 1)


def test_repetitions_and_overlaps_are_taken_once_and_gaps_not_at_all() -> None:
    buffer, process = InputBuffer(), _Process()
    buffer.connect(process.feed, process.end)
    assert buffer.put(0, b"abc")
    assert buffer.put(0, b"abc")
    assert buffer.put(1, b"bcde")
    assert not buffer.put(7, b"hi")
    assert not buffer.end(9)
    assert buffer.put(5, b"fg")
    assert buffer.end(7)
    assert buffer.end(7)
    assert (process.fed, process.ends) == (b"abcdefg", 1)
    assert buffer.credit() == Credit(7, 0, again=False, ended=True)
    assert buffer.put(7, b"after the end")
    assert process.fed == b"abcdefg"


def test_more_than_the_window_is_refused_until_some_is_taken() -> None:
    buffer, process = InputBuffer(), _Process()
    buffer.connect(process.feed, process.end)
    assert buffer.put(0, bytes(INPUT_WINDOW))
    assert not buffer.put(INPUT_WINDOW, b"x")
    buffer.taken = 1
    assert buffer.put(INPUT_WINDOW, b"x")


class _Nats:
    is_connected = True

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    async def publish(self, subject: str, data: bytes) -> None:
        self.said.append((subject.rpartition(".")[2], exec_frames.from_worker(data)))


def _client(nats: _Nats, token: str | None) -> ExecClient:
    place = (Scope("acme", "dev"), ids.new("exec"))
    return ExecClient(nats, place, token, InputBuffer(), lambda: None)  # type: ignore[arg-type]


async def test_output_waits_for_the_one_who_steers() -> None:
    client = _client(_Nats(), "a")
    await client.has_room(lambda: OUTPUT_WINDOW - 1)
    waiting = asyncio.create_task(client.has_room(lambda: OUTPUT_WINDOW))
    await asyncio.sleep(0)
    client.acknowledge("b", 100)
    await asyncio.sleep(0)
    assert not waiting.done(), "it was another client"
    client.acknowledge("a", 100)
    await waiting


async def test_output_waits_for_nobody_when_nobody_is_there() -> None:
    client = _client(_Nats(), "a")
    waiting = asyncio.create_task(client.has_room(lambda: 10 * OUTPUT_WINDOW))
    await asyncio.sleep(0)
    client.leave()
    await waiting


async def test_one_who_takes_over_is_told_to_the_one_before() -> None:
    nats = _Nats()
    client = _client(nats, "a")
    await client.attach(Attach("b"))
    await client.attach(Attach("b"))
    assert nats.said == [("a", Displaced())]
    assert client.client == "b"
