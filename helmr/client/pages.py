"""Lists of the history, put together from as many pages as it takes: a reply has a limit in bytes."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from helmr.client.wire import Wire

T = TypeVar("T")

#: Records the history gives at a time, at most.
_PAGE = 1000


async def newest(wire: Wire, noun: str, filters: dict[str, Any], record: type[T], limit: int) -> list[T]:
    """Up to ``limit`` records of ``noun`` (``runs``, ``sessions``, ``workspaces``), newest first.

    What was stored before the call is in it.
    """
    found: list[T] = []
    body = filters | {"fresh": True}
    while True:
        body["limit"] = max(min(limit - len(found), _PAGE), 1)
        page = await wire.call("history", noun, body, dict[str, Any])
        found += msgspec.convert(page[noun], list[record])  # type: ignore[valid-type]
        if page["next"] is None or len(found) >= limit:
            return found
        body |= {"before": page["next"], "fresh": False}
