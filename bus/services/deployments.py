"""Receiving deployments, and asking about them."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from bus.artifacts import ArtifactStore
from bus.deployments import Deployments
from bus.services.endpoint import Endpoint
from helmr.declarations import NAME
from helmr.errors import NotFound, TooLarge, UsageError
from helmr.models import Deployment
from helmr.sandbox import check_network, check_preload
from helmr.secret_targets import env_problem, file_problem
from helmr.subjects import Scope

#: Bytes of a deployment archive, compressed.
MAX_ARCHIVE = 64 * 1024**2
_DIGEST = re.compile(r"[0-9a-f]{64}")


class UploadRequest(msgspec.Struct, kw_only=True):
    """One part of an archive; parts are sent in order, each beginning at ``offset``."""

    archive: str
    offset: int
    data: bytes
    last: bool


class UploadReply(msgspec.Struct, kw_only=True):
    """``have``: bytes received so far; ``stored``: the archive is complete."""

    have: int
    stored: bool


class CreateRequest(msgspec.Struct, kw_only=True):
    """Record a deployment whose archive has been uploaded."""

    content_hash: str
    archive: str
    archive_bytes: int
    index: dict[str, Any]
    promote: bool = True


class DeploymentRef(msgspec.Struct, kw_only=True):
    """A deployment by id or version; none: the current one."""

    id: str | None = None


class NoArguments(msgspec.Struct):
    """A request without arguments."""


class DeploymentService:
    """The deployment service; ``scratch`` holds archives while they arrive."""

    def __init__(self, deployments: Deployments, artifacts: ArtifactStore) -> None:
        self.deployments = deployments
        self.artifacts = artifacts
        self._scratch = Path(tempfile.mkdtemp(prefix="helmr-upload-"))
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """Remove what has arrived only in part."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("deployment", "upload", UploadRequest, self.upload),
            Endpoint("deployment", "create", CreateRequest, self.create),
            Endpoint("deployment", "get", DeploymentRef, self.get),
            Endpoint("deployment", "list", NoArguments, self.list),
            Endpoint("deployment", "promote", DeploymentRef, self.promote),
        ]

    async def upload(self, _scope: Scope, request: UploadRequest) -> UploadReply:
        """Take one part; an archive that is stored already is complete at once."""
        if not _DIGEST.fullmatch(request.archive):
            raise UsageError("the archive's name is not a sha-256 in hex")
        if request.offset < 0:
            raise UsageError("an offset is not negative")
        # Several may send the same archive: no part may touch the file while another's last part is being stored.
        async with self._locks.setdefault(request.archive, asyncio.Lock()):
            return await self._receive(request)

    async def _receive(self, request: UploadRequest) -> UploadReply:
        if request.offset == 0 and await self.artifacts.has(request.archive):
            return UploadReply(have=0, stored=True)
        path = self._scratch / request.archive
        have = path.stat().st_size if path.exists() else 0
        if request.offset not in {0, have}:
            return UploadReply(have=have, stored=False)
        if request.offset + len(request.data) > MAX_ARCHIVE:
            path.unlink(missing_ok=True)
            raise TooLarge(
                f"the archive exceeds {MAX_ARCHIVE // 1024**2} MiB", hint="leave files out with .helmrignore"
            )
        with path.open("ab" if request.offset else "wb") as target:
            target.write(request.data)
        have = request.offset + len(request.data)
        if request.last:
            try:
                await self.artifacts.put(path, request.archive)
            finally:
                path.unlink(missing_ok=True)
        return UploadReply(have=have, stored=request.last)

    async def create(self, scope: Scope, request: CreateRequest) -> Deployment:
        """Record and (unless told otherwise) promote a deployment."""
        if not await self.artifacts.has(request.archive):
            raise NotFound("the archive of this deployment has not been uploaded", hint="run `helmr deploy` again")
        check_sandboxes(request.index)
        check_secrets(request.index)
        return await self.deployments.create(
            scope,
            content_hash=request.content_hash,
            archive=request.archive,
            archive_bytes=request.archive_bytes,
            index=request.index,
            promote=request.promote,
        )

    async def get(self, scope: Scope, request: DeploymentRef) -> Deployment:
        """One deployment."""
        return self.deployments.get(scope, request.id) if request.id else self.deployments.current(scope)

    async def list(self, scope: Scope, _request: NoArguments) -> list[Deployment]:
        """All deployments of the environment, newest first, without their indexes."""
        return [msgspec.structs.replace(d, index={}) for d in self.deployments.list(scope)]

    async def promote(self, scope: Scope, request: DeploymentRef) -> Deployment:
        """Make a deployment the current one."""
        if request.id is None:
            raise UsageError("say which deployment to promote")
        return await self.deployments.promote(scope, request.id)


def check_sandboxes(index: dict[str, Any]) -> None:
    """Refuse what no worker could enforce or do, whoever made the index: a network policy, or a module, that is none.

    Raises:
        UsageError: says which sandbox, and what is wrong.
    """
    for sandbox in index.get("sandboxes", ()):
        try:
            check_network(sandbox.get("network"))
        except ValueError as error:
            raise UsageError(
                f"sandbox {sandbox['name']}: {error}",
                hint='a network is "internet", "none", or a list of hosts such as ["api.example.com", "*.example.org"]',
            ) from error
        try:
            check_preload(sandbox.get("preload", ()))
        except ValueError as error:
            raise UsageError(f"sandbox {sandbox['name']}: {error}") from error


def check_secrets(index: dict[str, Any]) -> None:
    """Refuse secrets whose place would be unsafe, whoever made the index.

    Raises:
        UsageError: says which task, secret and place.
    """
    for task in index.get("tasks", ()):
        for secret in task.get("secrets", ()):
            env, file = secret.get("env"), secret.get("file")
            problem = (env_problem(env) if env is not None else None) or (
                file_problem(file, secret.get("mode", 0o400)) if file is not None else None
            )
            if problem or not NAME.fullmatch(str(secret.get("name"))):
                raise UsageError(f"task {task['id']}: secret {secret.get('name')!r}: {problem or 'that is no name'}")
