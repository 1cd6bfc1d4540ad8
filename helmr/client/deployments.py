"""Deployments: pack a task project, index it, upload it, promote it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from helmr.events import MESSAGE_PART
from helmr.models import Deployment

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient


class _UploadReply(msgspec.Struct):
    have: int
    stored: bool


class Deployments:
    """``client.deployments``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def deploy(
        self, root: Path, *, promote: bool = True, progress: Callable[[str], None] = lambda _: None
    ) -> Deployment:
        """Deploy the task project in the folder ``root``.

        Raises:
            ProjectError: a task module is broken or contradicts another; names file and line.
            TooLarge: the archive exceeds 64 MiB.
        """
        from helmr.config import load
        from helmr.indexing import index_archive
        from helmr.project import pack

        settings = load(root)
        progress(f"packing {root}")
        archive = await asyncio.to_thread(pack, settings.require_root(), settings.ignore)
        progress("indexing its task modules")
        index = await asyncio.to_thread(index_archive, archive, settings.modules)
        progress(f"uploading {len(archive.data)} bytes")
        name = hashlib.sha256(archive.data).hexdigest()
        await self._upload(name, archive.data)
        body = {
            "content_hash": archive.digest,
            "archive": name,
            "archive_bytes": len(archive.data),
            "index": msgspec.to_builtins(msgspec.structs.replace(index, retention=settings.retention)),
            "promote": promote,
        }
        return await self._client.wire.call("deployment", "create", body, Deployment)

    async def _upload(self, name: str, data: bytes) -> None:
        offset = 0
        while True:
            part = data[offset : offset + MESSAGE_PART]
            last = offset + len(part) >= len(data)
            body = {"archive": name, "offset": offset, "data": part, "last": last}
            reply = await self._client.wire.call("deployment", "upload", body, _UploadReply, timeout=60)
            if reply.stored:
                return
            offset = reply.have

    async def get(self, reference: str | None = None) -> Deployment:
        """A deployment by version, id or unique prefix; without one, the current deployment."""
        body: dict[str, Any] = {"id": reference}
        if reference is not None and reference.startswith(("dep_", "@")):
            body["id"] = await self._client.resolve("deployment", reference)
        return await self._client.wire.call("deployment", "get", body, Deployment)

    async def list(self) -> list[Deployment]:
        """Deployments, newest first, without their indexes."""
        return await self._client.wire.call("deployment", "list", {}, list[Deployment])

    async def promote(self, reference: str) -> Deployment:
        """Make a deployment the current one; promoting an older one is a rollback."""
        return await self._client.wire.call("deployment", "promote", {"id": reference}, Deployment)
