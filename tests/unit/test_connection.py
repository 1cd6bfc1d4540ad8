"""What nats-py does not survive, and our connection does."""

from __future__ import annotations

import asyncio

import pytest

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
