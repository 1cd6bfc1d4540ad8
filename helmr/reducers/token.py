"""The life of a token: pending until it is completed, cancelled or expired; one completion, however often it is said."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict
from helmr.events import Draft, TokenState, TokenStatus

#: Secrets of one token; the oldest gives way.
MAX_SECRETS = 8

_ENDS: dict[str, TokenStatus] = {"completed": "completed", "cancelled": "cancelled", "expired": "expired"}


def apply(state: TokenState | None, kind: str, data: dict[str, Any], at: datetime, *, token_id: str = "") -> TokenState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow; once the token has ended that is every event.
    """
    if state is None:
        if kind != "created":
            raise Conflict(f"the first event of a token is created, not {kind}")
        fixed = {"id": token_id, "status": "pending", "cursor": 1, "created_at": at}
        return msgspec.convert({**data, **fixed}, TokenState, strict=False)
    if state.status != "pending":
        raise Conflict(f"token {state.id} is {state.status}: {kind} cannot follow", details={"status": state.status})
    base = msgspec.structs.replace(state, cursor=state.cursor + 1)
    if kind == "awaited":
        return msgspec.structs.replace(base, waiters=(*state.waiters, data["run_id"]))
    if kind == "secret_added":
        return msgspec.structs.replace(base, secrets=(*state.secrets, data["hash"])[-MAX_SECRETS:])
    if kind not in _ENDS:
        raise Conflict(f"token {state.id}: {kind} cannot follow")
    return msgspec.structs.replace(
        base, status=_ENDS[kind], finished_at=at, digest=data.get("digest"), reason=data.get("reason")
    )


def digest(data: Any) -> str:
    """What tells completions apart: the sha-256 of the canonical JSON, in which the order of keys does not matter."""
    return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()


def complete(state: TokenState, data: Any, *, at: datetime) -> Draft | None:
    """Complete the token. None: it is, with the very same data.

    Raises:
        Conflict: it is completed with other data, cancelled or expired; ``details["status"]`` says which.
    """
    mark = digest(data)
    if state.status == "completed" and state.digest == mark:
        return None
    status = "expired" if state.status == "pending" and state.expires_at <= at else state.status
    if status == "completed":
        raise Conflict(f"token {state.id} is completed with other data", details={"status": status})
    if status != "pending":
        raise Conflict(f"token {state.id} is {status}", details={"status": status})
    return Draft(kind="completed", data={"data": data, "digest": mark}, message="completed")


def cancel(state: TokenState, *, reason: str | None) -> Draft | None:
    """End the token without a completion; a run that waits for it hears of it. None: it is cancelled already.

    Raises:
        Conflict: it has ended otherwise.
    """
    if state.status == "cancelled":
        return None
    if state.status != "pending":
        raise Conflict(f"token {state.id} is {state.status}", details={"status": state.status})
    return Draft(kind="cancelled", data={"reason": reason}, message=reason or "cancelled")


def expire(state: TokenState, *, at: datetime) -> Draft | None:
    """The time of the token is up. None: it has ended before, or its time is not up."""
    if state.status != "pending" or state.expires_at > at:
        return None
    return Draft(kind="expired", message="not completed in time")


def await_(state: TokenState, *, run_id: str) -> Draft | None:
    """A run is about to wait for the token. None: that is known, or the token has ended."""
    if state.status != "pending" or run_id in state.waiters or run_id == state.run_id:
        return None
    return Draft(kind="awaited", data={"run_id": run_id}, message=f"run {run_id} waits for it", source="worker")


def add_secret(state: TokenState, *, hashed: str) -> Draft:
    """One more secret completes the token.

    Raises:
        Conflict: it has ended.
    """
    if state.status != "pending":
        raise Conflict(f"token {state.id} is {state.status}", details={"status": state.status})
    return Draft(kind="secret_added", data={"hash": hashed}, message="a secret was made")
