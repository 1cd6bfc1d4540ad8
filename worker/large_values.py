"""Payloads and outputs too large for the log: fetched for a task and stored for a run, for as long as the store is away."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from bus.values import Values
from helmr.errors import Unavailable
from helmr.events import INLINE_VALUE, ArtifactRef

log = logging.getLogger(__name__)

#: Seconds between tries while the artifact store is away: nothing tells us that it is back.
_RETRY_DELAY = 1.0


async def fetch(values: Values, reference: ArtifactRef) -> bytes:
    """The JSON text of a large value."""
    while True:
        try:
            return await values.get(reference)
        except Unavailable as error:
            log.info("a large payload: %s; again", error)
            await asyncio.sleep(_RETRY_DELAY)


async def told(values: Values, output: Any) -> dict[str, Any]:
    """What the last event of a run says of its output: the output itself, or where it is stored now."""
    body = msgspec.json.encode(output)
    if len(body) <= INLINE_VALUE:
        return {"output": output}
    while True:
        try:
            return {"output_artifact": msgspec.to_builtins(await values.put(body))}
        except Unavailable as error:
            log.info("a large output: %s; again", error)
            await asyncio.sleep(_RETRY_DELAY)
