"""Artifacts: immutable blobs named by their sha-256 (hex): archives of deployments, packs and manifests of workspace versions.

One interface, :class:`ArtifactStore`; ``tests/integration/test_artifacts.py`` holds every store to it. The default is the
JetStream object store, which needs nothing else. A folder is quicker for large workspaces, where server and workers share one;
S3 (:mod:`bus.s3_artifacts`) is for many hosts.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.object_store import ObjectStore

from bus.s3_place import Place, S3Place
from helmr.errors import HelmrError, NotFound, Unavailable

#: Seconds that reading one blob may take: 64 MiB at 1 MB/s.
_READ_TIMEOUT = 60.0


class Stored(msgspec.Struct, frozen=True):
    """One blob of a store."""

    digest: str
    size: int
    at: datetime


class ArtifactStore(ABC):
    """Puts and gets blobs by their sha-256 (hex)."""

    async def check(self) -> None:  # noqa: B027  # most stores have nothing to be checked
        """Whether the store can be used, as far as that can be told without storing anything.

        Raises:
            ConfigError, NotAllowed: it cannot, until somebody puts that right.
            Unavailable: it does not answer.
        """

    @abstractmethod
    async def has(self, digest: str) -> bool:
        """Whether the blob is stored, whole.

        Raises:
            Unavailable: the store does not answer.
        """

    @abstractmethod
    async def _write(self, digest: str, data: bytes) -> None: ...

    @abstractmethod
    async def _read(self, digest: str) -> bytes: ...

    @abstractmethod
    async def delete(self, digest: str) -> None:
        """Remove a blob; that there is none is fine."""

    @abstractmethod
    def all(self) -> AsyncIterator[Stored]:
        """Every blob there is, in no order."""

    async def put_bytes(self, digest: str, data: bytes) -> None:
        """Store a blob, durably; storing the same blob twice is free.

        Raises:
            HelmrError: the data does not have this digest, or there is no room for it.
            Unavailable: the store does not answer.
        """
        if await asyncio.to_thread(digest_of, data) != digest:
            raise HelmrError(f"artifact {digest[:12]} arrived damaged", hint="try again")
        if not await self.has(digest):
            await self._write(digest, data)

    async def get_bytes(self, digest: str) -> bytes:
        """The blob, verified.

        Raises:
            NotFound: no such blob.
            HelmrError: the store has damaged it.
            Unavailable: the store does not answer.
        """
        data = await self._read(digest)
        if await asyncio.to_thread(digest_of, data) != digest:
            raise HelmrError(f"artifact {digest[:12]} is damaged in the store")
        return data

    async def put(self, path: Path, digest: str) -> None:
        """Store the file ``path``; raises what :meth:`put_bytes` does."""
        await self.put_bytes(digest, await asyncio.to_thread(path.read_bytes))

    async def get(self, digest: str, path: Path) -> None:
        """Write the blob to ``path``, atomically; raises what :meth:`get_bytes` does."""
        await asyncio.to_thread(_write_whole, path, await self.get_bytes(digest))


class JetStreamArtifacts(ArtifactStore):
    """Blobs in a bucket of the JetStream object store."""

    def __init__(self, nc: Nats, bucket: str) -> None:
        self._nc = nc
        self._name = bucket

    async def _bucket(self) -> ObjectStore:
        return await self._nc.jetstream().object_store(self._name)

    async def has(self, digest: str) -> bool:
        """Whether the blob is stored: its description comes after all of its bytes."""
        try:
            await (await self._bucket()).get_info(digest)
        except nats.js.errors.NotFoundError:
            return False
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        return True

    async def _write(self, digest: str, data: bytes) -> None:
        try:
            await (await self._bucket()).put(digest, data)
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error

    async def _read(self, digest: str) -> bytes:
        target = io.BytesIO()  # read into memory by nats-py itself, large blobs take quadratic time
        try:
            async with asyncio.timeout(_READ_TIMEOUT):  # nothing else ends it when the server goes away half way
                await (await self._bucket()).get(digest, writeinto=target)
        except nats.js.errors.NotFoundError as error:
            raise NotFound(f"no artifact {digest[:12]}") from error
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        return target.getvalue()

    async def delete(self, digest: str) -> None:
        """Remove a blob."""
        try:
            await (await self._bucket()).delete(digest)
        except nats.js.errors.NotFoundError:
            return
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error

    async def all(self) -> AsyncIterator[Stored]:
        """Every blob of the bucket."""
        try:
            found = await (await self._bucket()).list(ignore_deletes=True)
        except nats.js.errors.NotFoundError:
            return
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        for info in found:
            at = datetime.fromisoformat(info.mtime) if info.mtime else datetime.now(UTC)
            yield Stored(info.name, info.size or 0, at)


class DirectoryArtifacts(ArtifactStore):
    """Blobs as files of a folder: ``<folder>/<first two digits>/<digest>``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

    async def has(self, digest: str) -> bool:
        """Whether the file is there: it gets its name when it is whole."""
        return self._path(digest).exists()

    async def _write(self, digest: str, data: bytes) -> None:
        try:
            self._path(digest).parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(_write_whole, self._path(digest), data)
        except OSError as error:
            hint = "free some space there, or see to its permissions"
            raise HelmrError(f"cannot write below {self._folder}: {error.strerror}", hint=hint) from error

    async def _read(self, digest: str) -> bytes:
        try:
            return await asyncio.to_thread(self._path(digest).read_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"no artifact {digest[:12]}") from error
        except OSError as error:
            raise Unavailable(f"cannot read below {self._folder}: {error.strerror}") from error

    async def delete(self, digest: str) -> None:
        """Remove the file."""
        self._path(digest).unlink(missing_ok=True)

    async def all(self) -> AsyncIterator[Stored]:
        """Every file that has its final name."""
        for path in await asyncio.to_thread(lambda: list(self._folder.glob("??/*"))):
            if not path.name.startswith("."):
                status = path.stat()
                yield Stored(path.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def open_artifacts(nc: Nats, bucket: str, place: Place = None) -> ArtifactStore:
    """The store to use: a bucket of NATS, or the part of a place that is called like it.

    Raises:
        ConfigError: the place cannot be used.
    """
    if place is None:
        return JetStreamArtifacts(nc, bucket)
    if isinstance(place, S3Place):
        from bus.s3_artifacts import S3Artifacts

        return S3Artifacts(place.below(bucket))
    return DirectoryArtifacts(place / bucket)


def digest_of(data: bytes) -> str:
    """The sha-256, in hex."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def draft(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that gets its name ``path`` when all of it is on the disk, and not at all if the block raises."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".artifact-")
    try:
        with os.fdopen(handle, "wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _write_whole(path: Path, data: bytes) -> None:
    with draft(path) as target:
        target.write(data)


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"the artifact store does not answer: {error}")
