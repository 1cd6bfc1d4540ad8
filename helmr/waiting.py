"""The one way to wait: register with the run's journal, and get what is recorded, or what comes.

While a task waits its run holds no slot, its process may be ended, and the wait may last for months; the call returns in a new
process then, which has run the task's code again up to here.
"""

from __future__ import annotations

from typing import Any

from helmr import runtime
from helmr.errors import WaitCancelled, WaitTimeout

Request = dict[str, Any]


def wait(name: str, request: Request) -> Any:
    """Wait, and return the data.

    Args:
        name: what is waited for, as the journal knows it and people read it.
        request: ``kind`` (stream, token, timer) and its ``stream, token, correlation_id, timeout, due``; times in seconds.

    Raises:
        WaitTimeout: it did not come in time.
        WaitCancelled: it will never come.
        ConcurrentWait: the run waits already.
    """
    run = runtime.required(f"waiting for {name}")
    with run.waiting(name):
        slot = run.claim("wait", name)
        answer = slot.entry
        if answer is None:
            answer = run.ask({"op": "wait", **slot.key, **request})
    return _data(name, answer)


async def wait_async(name: str, request: Request) -> Any:
    """:func:`wait`, awaited."""
    run = runtime.required(f"waiting for {name}")
    with run.waiting(name):
        slot = run.claim("wait", name)
        answer = slot.entry
        if answer is None:
            answer = await run.ask_async({"op": "wait", **slot.key, **request})
    return _data(name, answer)


def _data(name: str, answer: dict[str, Any]) -> Any:
    match answer["outcome"]:
        case "completed":
            return answer.get("data")
        case "timed_out":
            raise WaitTimeout(f"{name} did not come in time")
        case _:
            raise WaitCancelled(f"{name} will never come: {answer.get('reason') or 'cancelled'}")
