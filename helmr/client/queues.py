"""Queues: get, list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helmr.models import Queue

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient


class Queues:
    """``client.queues``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def get(self, name: str) -> Queue:
        """One queue: its limits, who has a slot, and how many wait, by concurrency key.

        Raises:
            NotFound: it is not declared, and no live run is in it.
        """
        return await self._client.wire.call("queue", "get", {"name": name}, Queue)

    async def list(self) -> list[Queue]:
        """All queues of the environment, without ``holders`` and ``keys``."""
        return await self._client.wire.call("queue", "list", {}, list[Queue])
