"""Access tokens: making, showing and revoking what lets others do one thing over HTTP. The history lists them."""

from __future__ import annotations

from typing import Any

import msgspec

from bus import access
from bus.log import ACCESS, TOKEN, Log
from bus.services.endpoint import Endpoint
from bus.services.streams import MAX_KEY_LENGTH, Direction, Streams
from helmr import ids
from helmr.access import (
    DEFAULT_LIFETIME,
    MAX_LIFETIME,
    MAX_NOTE,
    MAX_USES,
    Access,
    AccessState,
    Action,
    NewAccess,
    access_record,
)
from helmr.errors import UsageError
from helmr.subjects import Scope


class CreateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A new access token; ``lifetime`` in seconds. A retry repeats ``request_id``; only the first answer has the secret.

    ``append`` and ``read`` need ``session`` and ``stream``, ``complete`` needs ``token``.
    """

    request_id: str
    action: Action
    session: str | None = None
    stream: str | None = None
    token: str | None = None
    correlation_id: str | None = None
    uses: int | None = None
    lifetime: float = DEFAULT_LIFETIME
    note: str | None = None


class AccessRef(msgspec.Struct, kw_only=True):
    """A request that names an access token."""

    id: str
    reason: str | None = None


class AccessTokens:
    """The service of access tokens."""

    def __init__(self, log: Log, streams: Streams) -> None:
        self.log = log
        self._streams = streams

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("access", "create", CreateRequest, self.create),
            Endpoint("access", "get", AccessRef, self.get),
            Endpoint("access", "revoke", AccessRef, self.revoke),
        ]

    async def create(self, scope: Scope, request: CreateRequest) -> NewAccess:
        """Make an access token for something that is there.

        Raises:
            UsageError: a limit is exceeded, or it says too little or too much about what it is for.
            NotFound: there is no such session, stream or token.
        """
        _check(request)
        if request.action == "complete":
            await self.log.present(TOKEN, scope, request.token or "")
        else:
            direction: Direction = "in" if request.action == "append" else "out"
            await self._streams.declared(scope, request.session or "", request.stream or "", direction)
        access_id = ids.derive("acc", *scope, request.request_id, at_ms=ids.time_ms(request.request_id))
        made = await access.create(self.log, scope, access_id, lifetime=request.lifetime, allowed=_allowed(request))
        return NewAccess(access=access_record(*scope, made.state), secret=made.secret)

    async def get(self, scope: Scope, request: AccessRef) -> Access:
        """One access token."""
        return access_record(*scope, (await self.log.present(ACCESS, scope, request.id)).state)

    async def revoke(self, scope: Scope, request: AccessRef) -> Access:
        """End an access token now; one that has ended stays as it is."""
        return access_record(*scope, await access.revoke(self.log, scope, request.id, reason=request.reason))


def _allowed(request: CreateRequest) -> dict[str, Any]:
    state = AccessState.__struct_fields__
    fields = msgspec.structs.asdict(request) | {"session_id": request.session, "token_id": request.token}
    return {name: value for name, value in fields.items() if name in state and value is not None}


def _check(request: CreateRequest) -> None:
    if not ids.is_id(request.request_id, "req"):
        raise UsageError(f"{request.request_id[:80]!r} is no request id", hint="use helmr.ids.new('req')")
    _check_target(request)
    if not 0 < request.lifetime <= MAX_LIFETIME:
        raise UsageError(f"an access token cannot live for {request.lifetime:g} s", hint="more than 0, up to 365d")
    if request.uses is not None and not 0 < request.uses <= MAX_USES:
        hint = "without a limit, uses are not counted"
        raise UsageError(
            f"an access token cannot be limited to {request.uses} uses, only to 1 to {MAX_USES}", hint=hint
        )
    if request.correlation_id is not None and not 0 < len(request.correlation_id) <= MAX_KEY_LENGTH:
        raise UsageError(f"the correlation id must have 1 to {MAX_KEY_LENGTH} characters")
    if request.note is not None and len(request.note) > MAX_NOTE:
        raise UsageError(f"the note is longer than {MAX_NOTE} characters")


def _check_target(request: CreateRequest) -> None:
    stream, token = (request.session, request.stream), request.token
    if request.action == "complete":
        if token is None or any(stream) or request.correlation_id is not None:
            raise UsageError("to complete, an access token is for a token, and no stream or correlation id")
    elif not all(stream) or token is not None:
        raise UsageError(f"to {request.action}, an access token is for a stream of a session, and no token")
