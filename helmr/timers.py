"""Sleeping for as long as it takes, at no cost: the run waits, and goes on to the second, over restarts of everything."""

from __future__ import annotations

from datetime import datetime, timezone

from helmr.durations import Duration, seconds
from helmr.errors import UsageError
from helmr.waiting import Request, wait, wait_async

_NAME = "timer"


def sleep(duration: Duration) -> None:
    """Go on after ``duration`` (``"10m"``, a timedelta, or seconds), counted from the first time the task comes here."""
    wait(_NAME, _after(duration))


async def sleep_async(duration: Duration) -> None:
    """:func:`sleep`, awaited."""
    await wait_async(_NAME, _after(duration))


def sleep_until(at: datetime) -> None:
    """Go on at a moment; one that has passed is now.

    Raises:
        UsageError: it has no time zone.
    """
    wait(_NAME, _at(at))


async def sleep_until_async(at: datetime) -> None:
    """:func:`sleep_until`, awaited."""
    await wait_async(_NAME, _at(at))


def _after(duration: Duration) -> Request:
    return {"kind": "timer", "timeout": seconds(duration, what="sleep")}


def _at(at: datetime) -> Request:
    if at.tzinfo is None:
        raise UsageError(f"{at} has no time zone", hint="e.g. datetime(2026, 3, 1, 7, tzinfo=timezone.utc)")
    return {"kind": "timer", "due": at.astimezone(timezone.utc).isoformat()}  # noqa: UP017  (3.10)
