"""Tokens in the log: made, waited for, completed, cancelled, expired; and their secrets (:mod:`bus.capabilities`)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

from bus import capabilities, timers
from bus.log import TOKEN, Log, Position
from bus.stored import Superseded
from helmr import events
from helmr.errors import NotFound
from helmr.events import Draft, TokenEvent, TokenState
from helmr.reducers import token as rules
from helmr.subjects import Scope

#: What the timer of a token is called (:mod:`bus.timers`).
TIMER = "token"


class Made(NamedTuple):
    """A token, and its one secret if it was made with one."""

    event: TokenEvent
    secret: str | None


async def create(
    log: Log,
    scope: Scope,
    token_id: str,
    *,
    timeout: float,  # noqa: ASYNC109  it is the token's
    tags: tuple[str, ...] = (),
    metadata: dict[str, Any] | None = None,
    run_id: str | None = None,
    session_id: str | None = None,
    with_secret: bool = False,
) -> Made:
    """Make a token; making it again (the id is the same) finds the first one, without a secret."""
    due = events.now() + timedelta(seconds=timeout)
    secret = capabilities.new_secret(token_id) if with_secret else None
    data = {
        "expires_at": due.isoformat(),
        "run_id": run_id,
        "session_id": session_id,
        "tags": list(tags),
        "metadata": metadata or {},
        "secrets": [capabilities.hashed(secret)] if secret else [],
    }
    await timers.arm(log, scope, token_id, TIMER, due)
    draft = Draft(kind="created", data=data, message="created", source="worker" if run_id else "control")
    try:
        position = await log.append(TOKEN, scope, token_id, Position(0, None), draft)
    except Superseded:
        found = await log.present(TOKEN, scope, token_id)
        await timers.arm(log, scope, token_id, TIMER, found.state.expires_at)
        return Made(found, None)
    return Made(_stored(position), secret)


def _stored(position: Position[TokenEvent]) -> TokenEvent:
    if position.event is None:
        raise NotFound("the token was not stored")
    return position.event


async def add_secret(log: Log, scope: Scope, token_id: str) -> str:
    """One more secret for a token.

    Raises:
        NotFound, Conflict: there is no such token, or it has ended.
    """
    secret = capabilities.new_secret(token_id)
    mark = capabilities.hashed(secret)
    await log.transact(TOKEN, scope, token_id, lambda state: rules.add_secret(state, hashed=mark))
    return secret


async def complete(log: Log, scope: Scope, token_id: str, data: Any) -> TokenEvent:
    """Complete a token; the same data again changes nothing.

    Raises:
        NotFound: there is no such token.
        Conflict: it has ended otherwise.
    """
    position = await log.transact(
        TOKEN,
        scope,
        token_id,
        lambda state: rules.complete(state, data, at=events.now()),
        headers=timers.cancel_header(scope, token_id, TIMER),
    )
    return _stored(position)


async def cancel(log: Log, scope: Scope, token_id: str, *, reason: str | None) -> TokenEvent:
    """Cancel a token; cancelling it twice is fine.

    Raises:
        NotFound: there is no such token.
        Conflict: it has ended otherwise.
    """
    headers = timers.cancel_header(scope, token_id, TIMER)
    return _stored(
        await log.transact(TOKEN, scope, token_id, lambda state: rules.cancel(state, reason=reason), headers=headers)
    )


async def expire(log: Log, scope: Scope, token_id: str) -> None:
    """Its timer fired: end it, or, if the timer was early, set it again."""
    position = await log.transact(TOKEN, scope, token_id, lambda state: rules.expire(state, at=events.now()))
    state: TokenState = position.state
    if state.status == "pending":
        await timers.arm(log, scope, token_id, TIMER, state.expires_at)


async def await_token(log: Log, scope: Scope, token_id: str, run_id: str) -> None:
    """Have the token know, before a run waits for it, whom to wake. A token that does not exist wakes nobody."""
    try:
        await log.transact(TOKEN, scope, token_id, lambda state: rules.await_(state, run_id=run_id))
    except NotFound:
        return
