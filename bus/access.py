"""Access tokens in the log: made, used, revoked, expired; and told by their secrets (:mod:`bus.capabilities`)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

from bus import capabilities, timers
from bus.log import ACCESS, Log, Position
from bus.stored import Superseded
from helmr import events
from helmr.access import AccessEvent, AccessState
from helmr.events import Draft
from helmr.reducers import access as rules
from helmr.subjects import Scope

#: What the timer of an access token is called (:mod:`bus.timers`).
TIMER = "access"


class Made(NamedTuple):
    """An access token, and its secret if it was made just now."""

    state: AccessState
    secret: str | None


async def create(log: Log, scope: Scope, access_id: str, *, lifetime: float, allowed: dict[str, Any]) -> Made:
    """Make an access token; making it again (the id is the same) finds the first one, without its secret.

    Args:
        lifetime: seconds until it expires.
        allowed: fields of :class:`~helmr.access.AccessState` that say what it is for.
    """
    secret = capabilities.new_secret(access_id)
    due = events.now() + timedelta(seconds=lifetime)
    await timers.arm(log, scope, access_id, TIMER, due)
    data = allowed | {"hash": capabilities.hashed(secret), "expires_at": due.isoformat()}
    draft = Draft(kind="created", data=data, message=f"may {allowed['action']}")
    try:
        position = await log.append(ACCESS, scope, access_id, Position(0, None), draft)
    except Superseded:
        found = await log.present(ACCESS, scope, access_id)
        await timers.arm(log, scope, access_id, TIMER, found.state.expires_at)
        return Made(found.state, None)
    return Made(position.state, secret)


async def use(log: Log, scope: Scope, access_id: str, *, key: str) -> None:
    """Count one use where uses are counted; requests with the same ``key`` count as one.

    Raises:
        NotAllowed: it cannot be used (any more).
        NotFound: there is no such access token.
    """
    mark = rules.key_of(key)
    await log.transact(ACCESS, scope, access_id, lambda state: rules.use(state, key=mark, at=events.now()))


async def revoke(log: Log, scope: Scope, access_id: str, *, reason: str | None) -> AccessState:
    """End it now; one that has ended stays as it is.

    Raises:
        NotFound: there is no such access token.
    """
    headers = timers.cancel_header(scope, access_id, TIMER)
    position = await log.transact(
        ACCESS, scope, access_id, lambda state: rules.revoke(state, reason=reason), headers=headers
    )
    state: AccessState = position.state
    return state


async def expire(log: Log, scope: Scope, access_id: str) -> None:
    """Its timer fired: end it, or, if the timer was early, set it again."""
    position = await log.transact(ACCESS, scope, access_id, lambda state: rules.expire(state, at=events.now()))
    state: AccessState = position.state
    if state.status == "active":
        await timers.arm(log, scope, access_id, TIMER, state.expires_at)


async def of_secret(log: Log, secret: str) -> tuple[Scope, AccessEvent] | None:
    """The access token that a secret is of, in whatever state that is; None if it is of none.

    Takes the same time to compare whether there is one by that name or not.

    Raises:
        Unavailable: the log does not answer.
    """
    found = await log.find(ACCESS, "acc", capabilities.named(secret))
    return found if capabilities.fits(secret, () if found is None else (found[1].state.hash,)) else None
