"""The pull loop: batches, expiry, redelivery, restarts and consumers that are gone."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from nats.aio.client import Client as Nats
from nats.js.api import AckPolicy, ConsumerConfig, StreamConfig

from bus import pull
from bus.pull import Delivery, Puller, ensure_consumer
from bus.requests import api
from bus.server import EmbeddedServer
from helmr.errors import Unavailable

pytestmark = pytest.mark.anyio

_CONSUMER = ConsumerConfig(durable_name="c", ack_policy=AckPolicy.EXPLICIT, ack_wait=1.0)


@pytest.fixture
async def numbers(nc: Nats) -> Nats:
    """A stream of ten messages, and a consumer of it."""
    await nc.jetstream().add_stream(StreamConfig(name="S", subjects=["s.>"]))
    for n in range(10):
        await nc.jetstream().publish("s.n", str(n).encode())
    await ensure_consumer(nc, "S", _CONSUMER.as_dict())
    return nc


async def _take(puller: Puller, batch: int) -> list[Delivery]:
    return [item async for item in puller.pull(batch)]


async def test_a_batch_comes_in_order_with_its_facts(numbers: Nats) -> None:
    async with Puller(numbers, "S", "c") as puller:
        items = await _take(puller, 4)
        assert [item.msg.data for item in items] == [b"0", b"1", b"2", b"3"]
        assert [(item.stream_seq, item.delivered, item.pending) for item in items] == [
            (n + 1, 1, 9 - n) for n in range(4)
        ]
        assert len(await _take(puller, 6)) == 6


async def test_an_empty_consumer_is_waited_for(numbers: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "EXPIRES", 2.2)
    async with Puller(numbers, "S", "c") as puller:
        for item in await _take(puller, 10):
            await item.msg.ack()
        waiting = asyncio.create_task(_take(puller, 1))
        await asyncio.sleep(0.3)
        await numbers.jetstream().publish("s.n", b"late")
        [late] = await waiting
        assert late.msg.data == b"late"
        await late.msg.ack()
        assert await _take(puller, 1) == [], "the request expires"


async def test_what_is_not_acknowledged_comes_again(numbers: Nats) -> None:
    async with Puller(numbers, "S", "c") as puller:
        first = await _take(puller, 10)
        for item in first[1:]:
            await item.msg.ack()
        again = await _take(puller, 1)
        assert [(item.msg.data, item.delivered) for item in again] == [(b"0", 2)]


async def test_leaving_it_takes_nothing_along(numbers: Nats) -> None:
    async with Puller(numbers, "S", "c") as puller:
        async for item in puller.pull(10):
            await item.msg.ack()
            break
    async with Puller(numbers, "S", "c") as other:
        items = await asyncio.wait_for(_take(other, 9), 5)
    assert len(items) == 9


async def test_a_consumer_that_is_deleted_is_noticed(numbers: Nats) -> None:
    async with Puller(numbers, "S", "c") as puller:
        await _take(puller, 10)
        waiting = asyncio.create_task(_take(puller, 1))
        await asyncio.sleep(0.2)
        await api(numbers, "CONSUMER.DELETE.S.c", None)
        with pytest.raises(Unavailable):
            await waiting


async def test_a_consumer_that_never_was_is_noticed(numbers: Nats) -> None:
    async with Puller(numbers, "S", "none") as puller:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(_take(puller, 1), 4)


async def test_a_killed_server_ends_the_request_and_the_next_one_goes_on(
    numbers: Nats, nats_server: EmbeddedServer
) -> None:
    keeping = asyncio.create_task(nats_server.supervise())
    async with Puller(numbers, "S", "c") as puller:
        for item in await _take(puller, 10):
            await item.msg.ack()
        waiting = asyncio.create_task(_take(puller, 1))
        await asyncio.sleep(0.2)
        assert nats_server.pid is not None
        os.kill(nats_server.pid, signal.SIGKILL)
        assert await asyncio.wait_for(waiting, 6) == []
        async with asyncio.timeout(10):
            await numbers.jetstream().publish("s.n", b"after")
            found: list[Delivery] = []
            while not found:
                found = await _take(puller, 1)
        assert found[0].msg.data == b"after"
    await nats_server.stop()
    await keeping


async def test_a_consumer_is_made_once(numbers: Nats) -> None:
    await ensure_consumer(numbers, "S", _CONSUMER.as_dict())
    with pytest.raises(Unavailable, match="cannot create consumer"):
        await ensure_consumer(numbers, "NONE", _CONSUMER.as_dict())
