"""What the HTTP endpoint takes out of a request: the bearer's secret, and the body within its bounds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from starlette.requests import Request

#: Bytes of JSON that are taken: as much as a record, and as what completes a token.
MAX_BODY = 256 * 1024
#: Seconds in which a body must have arrived.
_BODY_TIME = 10.0
#: Bytes of a body that are read at most, only to be able to say that it is too large.
_DROPPED = 16 * 1024 * 1024


class Refused(Exception):
    """The request ends with this status; there is nothing more to be said than one word, and perhaps ``told``."""

    def __init__(self, status: int, error: str, **told: str) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error} | told


def bearer(request: Request) -> str:
    """The secret of ``Authorization: Bearer <secret>``; empty if there is none."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def number(request: Request, name: str, default: int, most: int) -> int:
    """A whole number of the query, from 0 to ``most``.

    Raises:
        Refused: it is none.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise Refused(400, "bad_request", parameter=name)
    return min(int(text), most)


async def body(request: Request) -> Any:
    """The JSON of a request; an empty body is null.

    Raises:
        Refused: it is too large, comes too slowly, or is no JSON.
    """
    try:
        async with asyncio.timeout(_BODY_TIME):
            text = await _read(request)
    except TimeoutError:
        raise Refused(408, "too_slow") from None
    try:
        return msgspec.json.decode(text) if text else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(400, "not_json") from None


async def _read(request: Request) -> bytes:
    """The body. Of one that is too large the rest is read and dropped: a client that still sends does not hear the answer."""
    text, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY:
            text += part
        elif size > _DROPPED:
            break
    if size > MAX_BODY:
        raise Refused(413, "too_large")
    return bytes(text)
