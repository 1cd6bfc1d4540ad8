"""Artifacts: immutable blobs named by their sha-256, in the JetStream object store.

Reads always go to a file: nats-py's in-memory ``get`` is quadratic (3 MB/s at 100 MB).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.object_store import ObjectStore

from bus import topology
from helmr.errors import HelmrError, NotFound, Unavailable


class ArtifactStore:
    """Puts and gets blobs by their sha-256 (hex)."""

    def __init__(self, nc: Nats) -> None:
        self.nc = nc

    async def _bucket(self) -> ObjectStore:
        return await self.nc.jetstream().object_store(topology.ARTIFACTS)

    async def has(self, digest: str) -> bool:
        """Whether the blob is stored."""
        try:
            await (await self._bucket()).get_info(digest)
        except nats.js.errors.NotFoundError:
            return False
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the artifact store does not answer: {error}") from error
        return True

    async def put(self, path: Path, digest: str) -> None:
        """Store the file ``path``; storing the same blob twice is free.

        Raises:
            HelmrError: the file does not have this digest.
        """
        if file_digest(path) != digest:
            raise HelmrError(f"artifact {digest[:12]} arrived damaged", hint="try again")
        if await self.has(digest):
            return
        try:
            with path.open("rb") as source:
                await (await self._bucket()).put(digest, source)
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the artifact store does not take {digest[:12]}: {error}") from error

    async def get(self, digest: str, path: Path) -> None:
        """Write the blob to ``path``, atomically and verified.

        Raises:
            NotFound: no such blob.
        """
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".artifact-")
        try:
            with os.fdopen(handle, "wb") as target:
                await (await self._bucket()).get(digest, writeinto=target)
            if file_digest(Path(name)) != digest:
                raise HelmrError(f"artifact {digest[:12]} is damaged in the store")
            Path(name).replace(path)
        except nats.js.errors.NotFoundError as error:
            raise NotFound(f"no artifact {digest[:12]}") from error
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the artifact store does not answer: {error}") from error
        finally:
            Path(name).unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """The sha-256 of a file, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
