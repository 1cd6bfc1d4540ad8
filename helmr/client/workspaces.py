"""Workspaces: get, list, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helmr.client.pages import newest
from helmr.models import Workspace

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds a stop may take: the worker ends what is left of the container's processes first.
_STOP_TIMEOUT = 40.0


class Workspaces:
    """``client.workspaces``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def get(self, workspace: str | Workspace) -> Workspace:
        """One workspace, by id, unique prefix or ``@last``."""
        return await self._client.wire.call("workspace", "get", {"id": await self._id(workspace)}, Workspace)

    async def list(self, *, limit: int = 50) -> list[Workspace]:
        """Workspaces, newest first."""
        return await newest(self._client.wire, "workspaces", {}, Workspace, limit)

    async def stop(self, workspace: str | Workspace) -> Workspace:
        """End the container of a workspace; its files stay.

        Raises:
            Conflict: a run executes in it.
        """
        body = {"id": await self._id(workspace)}
        return await self._client.wire.call("workspace", "stop", body, Workspace, timeout=_STOP_TIMEOUT)

    async def _id(self, workspace: str | Workspace) -> str:
        given = workspace if isinstance(workspace, str) else workspace.id
        return await self._client.resolve("workspace", given)
