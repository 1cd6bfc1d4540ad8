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
from helmr.events import MAX_VALUE, MESSAGE_PART, ArtifactRef

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

    async def join(self, parts: list[str]) -> bytes:
        """The JSON of a payload that was put in parts, in this order.

        Raises:
            UsageError: a part is not there.
            TooLarge: it exceeds 16 MiB.
        """
        if len(parts) > MAX_VALUE // MESSAGE_PART:
            raise _too_large()
        body = bytearray()
        for part in parts:
            try:
                body += await self._store.get_bytes(part)
            except NotFound as error:
                raise UsageError("a part of the payload is not there (any more)", hint="start it again") from error
            if len(body) > MAX_VALUE:  # whoever sends parts decides how large they are
                raise _too_large()
        return bytes(body)

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
        return Page(data=body[offset : offset + MESSAGE_PART], size=len(body))


def _too_large() -> TooLarge:
    hint = "pass a reference to the data instead"
    return TooLarge(f"the payload has more than {MAX_VALUE >> 20} MiB of JSON", hint=hint)
