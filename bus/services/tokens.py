"""Tokens from outside of tasks: making, showing, completing and cancelling them. The history lists them."""

from __future__ import annotations

from typing import Any

import msgspec

from bus import tokens
from bus.log import TOKEN, Log
from bus.services.endpoint import Endpoint
from helmr import ids
from helmr.errors import TooLarge, UsageError
from helmr.models import NewToken, Token, token_record
from helmr.subjects import Scope
from helmr.tags import check_tags
from helmr.tokens import DEFAULT_TIMEOUT, MAX_METADATA, MAX_TIMEOUT

#: Bytes of JSON that a token can be completed with: as much as a record.
MAX_DATA = 256 * 1024


class CreateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new token; ``timeout`` in seconds. A retry repeats ``request_id``; only the first answer has the secret."""

    request_id: str
    timeout: float = DEFAULT_TIMEOUT
    tags: list[str] = []
    metadata: dict[str, Any] = {}


class TokenRef(msgspec.Struct, kw_only=True):
    """A request that names a token."""

    id: str
    reason: str | None = None


class CompleteRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Complete a token with data, any JSON."""

    id: str
    data: Any = None


class Tokens:
    """The token service."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("token", "create", CreateRequest, self.create),
            Endpoint("token", "get", TokenRef, self.get),
            Endpoint("token", "complete", CompleteRequest, self.complete),
            Endpoint("token", "cancel", TokenRef, self.cancel),
        ]

    async def create(self, scope: Scope, request: CreateRequest) -> NewToken:
        """Make a token with a secret.

        Raises:
            UsageError, TooLarge: a limit is exceeded.
        """
        _check(request)
        token_id = ids.derive("tok", *scope, request.request_id, at_ms=ids.time_ms(request.request_id))
        made = await tokens.create(
            self.log,
            scope,
            token_id,
            timeout=request.timeout,
            tags=tuple(sorted(set(request.tags))),
            metadata=request.metadata,
            with_secret=True,
        )
        return NewToken(token=token_record(*scope, made.event), secret=made.secret)

    async def get(self, scope: Scope, request: TokenRef) -> Token:
        """One token."""
        return token_record(*scope, await self.log.present(TOKEN, scope, request.id))

    async def complete(self, scope: Scope, request: CompleteRequest) -> Token:
        """Complete a token; the same data again changes nothing.

        Raises:
            Conflict: it is completed with other data, cancelled or expired.
            TooLarge: the data exceeds 256 KiB of JSON.
        """
        check_data(request.data)
        return token_record(*scope, await tokens.complete(self.log, scope, request.id, request.data))

    async def cancel(self, scope: Scope, request: TokenRef) -> Token:
        """Cancel a token; a run that waits for it hears of it."""
        return token_record(*scope, await tokens.cancel(self.log, scope, request.id, reason=request.reason))


def check_data(data: Any) -> None:
    """Refuse what is too large to complete a token with.

    Raises:
        TooLarge: it exceeds 256 KiB of JSON.
    """
    size = len(msgspec.json.encode(data))
    if size > MAX_DATA:
        raise TooLarge(f"the data is {size} bytes of JSON; the limit is {MAX_DATA}", hint="pass a reference instead")


def _check(request: CreateRequest) -> None:
    if not ids.is_id(request.request_id, "req"):
        raise UsageError(f"{request.request_id[:80]!r} is no request id", hint="use helmr.ids.new('req')")
    if not 0 < request.timeout <= MAX_TIMEOUT:
        raise UsageError(f"a token's timeout of {request.timeout:g} s is not between 0 and 365 d")
    check_tags(request.tags, of="a token")
    if len(msgspec.json.encode(request.metadata)) > MAX_METADATA:
        raise TooLarge(f"the metadata of a token exceeds {MAX_METADATA >> 10} KiB of JSON")
