"""The life of an access token: active until it is revoked or its time is up, with as many uses as it was made for."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any, Literal

import msgspec

from helmr.access import AccessState
from helmr.errors import Conflict, NotAllowed
from helmr.events import Draft

_ENDS: dict[str, Literal["revoked", "expired"]] = {"revoked": "revoked", "expired": "expired"}
#: Hexadecimal digits that tell the uses of one access token apart.
_KEY_LENGTH = 32


def apply(
    state: AccessState | None, kind: str, data: dict[str, Any], at: datetime, *, access_id: str = ""
) -> AccessState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow; once the access token has ended that is every event, once it is used up another use.
    """
    if state is None:
        if kind != "created":
            raise Conflict(f"the first event of an access token is created, not {kind}")
        fixed = {"id": access_id, "status": "active", "cursor": 1, "created_at": at}
        return msgspec.convert({**data, **fixed}, AccessState, strict=False)
    if state.status != "active":
        raise Conflict(f"access token {state.id} is {state.status}: {kind} cannot follow")
    base = msgspec.structs.replace(state, cursor=state.cursor + 1)
    if kind == "used":
        if state.used_up:
            raise Conflict(f"access token {state.id} is used up")
        return msgspec.structs.replace(base, used=state.used + 1, keys=(*state.keys, data["key"]))
    if kind not in _ENDS:
        raise Conflict(f"access token {state.id}: {kind} cannot follow")
    return msgspec.structs.replace(base, status=_ENDS[kind], finished_at=at, reason=data.get("reason"))


def key_of(text: str) -> str:
    """What a use is told apart by: requests with the same ``text`` are the same use."""
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def use(state: AccessState, *, key: str, at: datetime) -> Draft | None:
    """Count one use. None: it needs no counting, or was counted before (its key is known), even if that was the last one.

    Raises:
        NotAllowed: it has ended, its time is up though nobody has said so yet, or it is used up.
    """
    if state.status != "active" or state.expires_at <= at:
        raise NotAllowed(f"access token {state.id} is not active")
    if state.uses is None or key in state.keys:
        return None
    if state.used_up:
        raise NotAllowed(f"access token {state.id} is used up")
    return Draft(kind="used", data={"key": key}, message=f"used {state.used + 1} of {state.uses} times")


def revoke(state: AccessState, *, reason: str | None) -> Draft | None:
    """End it before its time. None: it has ended already, however."""
    if state.status != "active":
        return None
    return Draft(kind="revoked", data={"reason": reason}, message=reason or "revoked")


def expire(state: AccessState, *, at: datetime) -> Draft | None:
    """Its time is up. None: it has ended before, or its time is not up."""
    if state.status != "active" or state.expires_at > at:
        return None
    return Draft(kind="expired", message="its time is up")
