"""Deliveries are worked on side by side; those of one key in order; what is not done is given back."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from nats.aio.msg import Msg

from bus.pull import Delivery
from bus.shards import sharded

pytestmark = pytest.mark.anyio


class _Msg:
    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.returned = False

    async def nak(self) -> None:
        self.returned = True


def _item(key: str, number: int) -> Delivery:
    return Delivery(cast("Msg", _Msg(f"{key} {number}")), number, 1, 0)


async def test_keys_go_side_by_side_and_each_in_order() -> None:
    keys = [f"key-{n}" for n in range(8)]
    done: dict[str, list[int]] = {key: [] for key in keys}
    at_work = most = 0
    finished = asyncio.Event()

    async def work(item: Delivery) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        for _ in range(item.stream_seq % 3 + 1):
            await asyncio.sleep(0)
        at_work -= 1
        done[item.msg.reply.split()[0]].append(item.stream_seq)
        if sum(map(len, done.values())) == 80:
            finished.set()

    async with sharded(work, width=16) as shards:
        for number in range(10):
            for key in keys:
                await shards.put(key, _item(key, number))
        await finished.wait()
    assert done == {key: list(range(10)) for key in keys}
    assert most > 1


async def test_what_is_in_hand_is_bounded() -> None:
    taken = 0

    async def work(_item: Delivery) -> None:
        await asyncio.Event().wait()

    async with sharded(work, width=1) as shards:

        async def fill() -> None:
            nonlocal taken
            while True:
                await shards.put("key", _item("key", taken))
                taken += 1

        filling = asyncio.create_task(fill())
        for _ in range(100):
            await asyncio.sleep(0)
        filling.cancel()
    assert taken == 5


async def test_an_error_ends_it_and_gives_back_what_is_not_done() -> None:
    items = [_item("key", number) for number in range(3)]

    async def work(item: Delivery) -> None:
        if item.stream_seq == 1:
            raise OSError("gone")

    async def put_all() -> None:
        async with sharded(work, width=1) as shards:
            for item in items:
                await shards.put("key", item)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await put_all()
    assert caught.group_contains(OSError, match="gone")
    assert [cast("_Msg", item.msg).returned for item in items] == [False, True, True]
