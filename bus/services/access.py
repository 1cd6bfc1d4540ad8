"""Access tokens: making, showing, listing and revoking what lets the outside world do one thing over HTTP."""

from __future__ import annotations

from typing import Any

import msgspec

from bus import access
from bus.log import ACCESS, TOKEN, Log, get_message
from bus.services.endpoint import Endpoint
from bus.services.streams import MAX_KEY_LENGTH, Direction, Streams
from bus.topology import RUNS
from helmr import ids, subjects
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

#: Access tokens in one answer, at most.
_PAGE = 200


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


class ListRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The newest access tokens, perhaps only those of a session, or those that can still be used."""

    session: str | None = None
    active: bool = False
    limit: int = 50


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
            Endpoint("access", "list", ListRequest, self.newest),
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

    async def newest(self, scope: Scope, request: ListRequest) -> list[Access]:
        """The newest access tokens."""
        found: list[Access] = []
        for access_id in reversed(await self._ids(scope)):
            record = access_record(*scope, (await self.log.present(ACCESS, scope, access_id)).state)
            if request.session in (None, record.session_id) and (not request.active or record.status == "active"):
                found.append(record)
            if len(found) == min(request.limit, _PAGE):
                break
        return found

    async def _ids(self, scope: Scope) -> list[str]:
        created, seq = subjects.created(scope, "access"), 0
        found: list[str] = []
        while (message := await get_message(self.log.js, RUNS, created, after=seq)) is not None:
            seq = message[0]
            found.append(ACCESS.decode(message[1]).access_id)
        return found


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
