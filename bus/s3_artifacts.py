"""Artifacts in S3, or in what speaks like it: for workers on many hosts. Needs the optional package ``obstore``.

The library signs, retries, and sends large blobs in parts. It reads credentials and further settings from the ``AWS_…``
variables itself. What it raises is translated here: its messages are pages long, and name neither the cause nor the remedy.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bus.artifacts import ArtifactStore, Stored, draft
from bus.s3_place import S3Place
from helmr.errors import ConfigError, HelmrError, NotAllowed, NotFound, Unavailable

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Store

#: Bytes of a part of a large blob, and how many are on their way at once: what a blob takes of memory at most.
_PART = 8 * 1024**2
_PARTS = 4
#: Bytes of a blob that are written to a file at once.
_STEP = 1024**2
#: Where requests wait for their answers. The library could do so without threads, but its own would then call into an
#: interpreter that is about to end, which aborts the process; and the threads of asyncio are for files.
_THREADS = ThreadPoolExecutor(16, thread_name_prefix="s3")
#: Seconds that one request may take: 8 MiB at 280 kB/s.
_REQUEST = timedelta(seconds=30)
_CONNECT = timedelta(seconds=5)
#: Seconds that a request is repeated for, while the service is away or asks for time.
RETRIES = 30.0
_NAME = re.compile(r"[0-9a-f]{64}")
_STATUS = re.compile(r"status code: (\d+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
#: Where the library looks for credentials when there are none: the metadata service of a cloud's machine.
_METADATA = re.compile(r"169\.254\.|InstanceCredential|/latest/api/token|metadata_endpoint")

T = TypeVar("T")


class S3Artifacts(ArtifactStore):
    """Blobs as objects ``<prefix>/<digest>`` of a bucket; others that are there are left alone."""

    def __init__(self, place: S3Place, *, retries: float = RETRIES) -> None:
        """Connects to nothing yet.

        Raises:
            ConfigError: the package is not installed, or the place or an ``AWS_…`` variable is wrong.
        """
        self._place = place
        self._store = _open(place, retries)

    async def check(self) -> None:
        """Whether the bucket can be reached, and listed.

        Raises:
            ConfigError: there is no such bucket.
            NotAllowed: the credentials are missing or refused.
            Unavailable: the service does not answer.
        """
        async for _ in self._listed(chunk=1):
            return

    async def has(self, digest: str) -> bool:
        """Whether the object is there: it appears when it is whole."""
        try:
            await self._ask(lambda: self._store.head(digest))
        except NotFound:
            return False
        return True

    async def _write(self, digest: str, data: bytes) -> None:
        await self._send(digest, data)

    async def _send(self, digest: str, source: bytes | Path) -> None:
        await self._ask(lambda: self._store.put(digest, source, chunk_size=_PART, max_concurrency=_PARTS))

    async def _read(self, digest: str) -> bytes:
        return await self._ask(lambda: bytes(self._store.get(digest).bytes()), f"no artifact {digest[:12]}")

    async def put(self, path: Path, digest: str) -> None:
        """Store a file, part by part; raises what :meth:`put_bytes` does."""
        if await asyncio.to_thread(_digest_of_file, path) != digest:
            raise HelmrError(f"artifact {digest[:12]} arrived damaged", hint="try again")
        if not await self.has(digest):
            await self._send(digest, path)

    async def get(self, digest: str, path: Path) -> None:
        """Write the blob to a file, as it comes; raises what :meth:`get_bytes` does."""

        def read() -> None:
            found = hashlib.sha256()
            chunks = self._store.get(digest).stream(min_chunk_size=_STEP)
            with draft(path) as target:
                for chunk in chunks:
                    found.update(chunk)
                    target.write(chunk)
                if found.hexdigest() != digest:
                    raise HelmrError(f"artifact {digest[:12]} is damaged in the store")

        await self._ask(read, f"no artifact {digest[:12]}")

    async def delete(self, digest: str) -> None:
        """Remove the object."""
        with suppress(NotFound):
            await self._ask(lambda: self._store.delete(digest))

    async def all(self) -> AsyncIterator[Stored]:
        """Every object whose name is that of a blob."""
        async for stored in self._listed(chunk=1000):
            yield stored

    async def _listed(self, *, chunk: int) -> AsyncIterator[Stored]:
        pages = self._store.list(chunk_size=chunk)
        while (page := await self._ask(lambda: next(pages, None))) is not None:
            for each in page:
                if _NAME.fullmatch(each["path"]):
                    yield Stored(each["path"], each["size"], each["last_modified"])

    async def _ask(self, request: Callable[[], T], missing: str = "no such artifact") -> T:
        """The answer to a request, or what is wrong with it in our words."""
        from obstore.exceptions import BaseError

        try:
            return await asyncio.get_running_loop().run_in_executor(_THREADS, request)
        except (BaseError, FileNotFoundError) as error:
            raise _translated(str(error), self._place, missing) from error


def _open(place: S3Place, retries: float) -> S3Store:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigError("artifacts in S3 need the package obstore", hint="pip install 'helmr[s3]'") from error
    endpoint = place.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # One blob at a time is deleted, and not every imitation of S3 knows the request for many.
    config: S3Config = {"disable_bulk_delete": True}
    if place.endpoint:
        config["endpoint"] = place.endpoint
    if place.region:
        config["region"] = place.region
    try:
        return S3Store(
            place.bucket,
            prefix=place.prefix,
            config=config,
            client_options={
                "allow_http": (endpoint or "").startswith("http://"),
                "connect_timeout": _CONNECT,
                "timeout": _REQUEST,
            },
            retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=retries)},
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"{place} cannot be used: {_first_line(str(error))}", hint="see the AWS_… variables"
        ) from error


def _translated(text: str, place: S3Place, missing: str) -> HelmrError:
    """The error for what the library says: status and code stand in a text of many lines."""
    status, code = (found.group(1) if (found := pattern.search(text)) else "" for pattern in (_STATUS, _CODE))
    if code == "NoSuchBucket":
        return ConfigError(f"there is no bucket {place.bucket}{_at(place)}", hint="make it, or see to --artifacts")
    if _METADATA.search(text):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role that may use the bucket"
        return NotAllowed(f"there are no credentials for {place}", hint=hint)
    if status in {"401", "403"}:
        hint = "see to AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to what they may do in the bucket, and to the clock"
        return NotAllowed(f"access to {place} is refused{f': {code}' if code else ''}", hint=hint)
    if status == "404":
        return NotFound(missing)
    reason = f"it says {status} {code}".rstrip() if status else _first_line(text).rpartition(" - ")[2]
    return Unavailable(f"{place} does not answer: {reason}", hint="it was asked several times; see whether it is up")


def _at(place: S3Place) -> str:
    return f" at {place.endpoint}" if place.endpoint else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
