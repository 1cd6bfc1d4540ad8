"""Raw requests to the JetStream API, for what nats-py has no call for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nats.errors
from nats.aio.client import Client as Nats

from helmr.errors import Unavailable


async def api(nc: Nats, call: str, body: dict[str, Any] | None, *, timeout: float = 5.0) -> dict[str, Any]:  # noqa: ASYNC109
    """The server's JSON answer to ``$JS.API.<call>``; an API error is part of the answer, under ``error``.

    Raises:
        Unavailable: no answer within ``timeout`` seconds.
    """
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    try:
        reply = await nc.request(f"$JS.API.{call}", json.dumps(body).encode() if body else b"", timeout=timeout)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"JetStream does not answer ({call}): {type(error).__name__}") from error
    if task and task.cancelling() > cancels:
        # Up to Python 3.11 wait_for, which nats-py uses, forgets a cancellation that comes together with the answer.
        raise asyncio.CancelledError
    answer: dict[str, Any] = json.loads(reply.data)
    return answer
