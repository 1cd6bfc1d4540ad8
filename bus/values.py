"""Payloads and outputs too large for an event: their JSON is stored as an artifact, and the event has the reference.

They are kept with the packs of workspace versions, named by their content like these, and collected like these once no event of
the log refers to them (:mod:`bus.garbage`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import msgspec

from bus.artifacts import ArtifactStore, digest_of
from helmr.errors import NotFound, TooLarge, UsageError
from helmr.events import MAX_VALUE, ArtifactRef

#: Bytes in one reply: base64 makes them a third larger, and external servers take 1 MiB by default.
PAGE = 512 * 1024
#: Values that are kept while they are read page by page.
_KEPT = 2


class Page(msgspec.Struct, kw_only=True):
    """Bytes of a value's JSON from an offset on, and how many it has."""

    data: bytes
    size: int


class Values:
    """Large values in one artifact store."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._recent: OrderedDict[str, bytes] = OrderedDict()

    async def put(self, body: bytes) -> ArtifactRef:
        """Store the JSON of a value; storing it twice is free.

        Raises:
            HelmrError: there is no room for it.
            Unavailable: the store does not answer.
        """
        digest = await asyncio.to_thread(digest_of, body)
        await self._store.put_bytes(digest, body)
        return ArtifactRef(digest=digest, bytes=len(body))

    async def join(self, parts: list[str]) -> ArtifactRef:
        """Store the value whose JSON was put in parts, in this order.

        Raises:
            UsageError: a part is not there.
            TooLarge: it exceeds 16 MiB.
        """
        if len(parts) > MAX_VALUE // PAGE:
            raise TooLarge(
                f"the payload has more than {MAX_VALUE >> 20} MiB of JSON", hint="pass a reference to the data instead"
            )
        try:
            return await self.put(b"".join([await self._store.get_bytes(part) for part in parts]))
        except NotFound as error:
            raise UsageError("a part of the payload is not there (any more)", hint="start it again") from error

    async def get(self, reference: ArtifactRef) -> bytes:
        """The JSON of a value.

        Raises:
            NotFound: it has been collected: its run left the log long ago.
            HelmrError: the store has damaged it.
            Unavailable: the store does not answer.
        """
        return await self._store.get_bytes(reference.digest)

    async def page(self, reference: ArtifactRef, offset: int) -> Page:
        """Part of the JSON of a value; raises what :meth:`get` does."""
        body = self._recent.pop(reference.digest, None) or await self.get(reference)
        self._recent[reference.digest] = body
        while len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return Page(data=body[offset : offset + PAGE], size=len(body))
