"""What nats-py does not survive, and our connection does."""

from __future__ import annotations

import asyncio

import pytest

from helmr import connection
from helmr.connection import heed_cancel

pytestmark = pytest.mark.anyio


async def _answers_when_cancelled() -> str:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "the answer came just then"
    return "never"


async def test_a_cancellation_that_comes_with_the_answer_is_heeded() -> None:
    task = asyncio.create_task(heed_cancel(_answers_when_cancelled()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_deadline_is_heeded_too() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await heed_cancel(_answers_when_cancelled())


async def test_else_it_is_as_if_it_were_not_there() -> None:
    async def answer() -> int:
        return 42

    assert await heed_cancel(answer()) == 42


async def test_what_swallows_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CANCEL_AGAIN", 0.001)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 3:
                    raise

    with pytest.raises(TimeoutError):
        await connection.within(0.001, stubborn())
    assert swallowed == 3


async def test_what_is_done_in_time_returns_or_fails_as_it_does() -> None:
    assert await connection.within(60, asyncio.sleep(0, "done")) == "done"

    async def fails() -> None:
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        await connection.within(60, fails())
