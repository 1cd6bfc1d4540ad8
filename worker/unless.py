"""Waits for work that may be broken off: by an event that comes first, or by a time that is up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T | None:  # noqa: ASYNC109
    """What the work comes to, or None when the event or the end of ``timeout`` came first: it has been cancelled then."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        waiting.cancel()
        if not working.done():
            await cancel_and_wait(working)


async def cancel_and_wait(task: asyncio.Future[Any]) -> None:
    """Cancel a task, and return when it has ended, however it did."""
    task.cancel()
    await asyncio.wait({task})
