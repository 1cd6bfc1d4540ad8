"""Access tokens: narrow capabilities for the outside world, what may become of them, and the record of one that users see.

The holder of one may append to one input stream, read one output stream, or complete one token, over HTTP and nothing else.
The rules of its life are in :mod:`helmr.reducers.access`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from helmr.events import Source

#: Seconds an access token can be used in, unless told otherwise, and at most.
DEFAULT_LIFETIME = 3600.0
MAX_LIFETIME = 365 * 86400.0
#: Uses that can be counted: what has been used is kept in the state, so that a repeated request counts once.
MAX_USES = 100
#: Characters of a note.
MAX_NOTE = 200

Action = Literal["append", "read", "complete"]


class AccessState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of the events of an access token; ``hash`` is the sha-256 of its secret.

    ``keys`` tells the counted uses apart: a digest of what each request said to be the same as.
    """

    id: str
    status: Literal["active", "revoked", "expired"]
    cursor: int
    action: Action
    hash: str
    expires_at: datetime
    session_id: str | None = None
    stream: str | None = None
    token_id: str | None = None
    correlation_id: str | None = None
    uses: int | None = None  #: how often it can be used; None: uses are not counted
    used: int = 0
    keys: tuple[str, ...] = ()
    note: str | None = None
    reason: str | None = None
    created_at: datetime
    finished_at: datetime | None = None

    @property
    def used_up(self) -> bool:
        """Whether all of the uses it was made for are counted."""
        return self.uses is not None and self.used >= self.uses


class AccessEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to an access token: ``created, used, revoked, expired``."""

    cursor: int
    id: str
    access_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: AccessState


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What an access token allows, and whether it still does. Its secret is nowhere in it."""

    id: str
    status: Literal["active", "used_up", "revoked", "expired"]
    project: str
    environment: str
    action: Action
    session_id: str | None
    stream: str | None
    token_id: str | None
    correlation_id: str | None
    uses: int | None
    used: int
    note: str | None
    reason: str | None
    created_at: datetime
    expires_at: datetime
    finished_at: datetime | None
    cursor: int


def access_record(project: str, environment: str, state: AccessState) -> Access:
    """The record of an access token."""
    return Access(
        id=state.id,
        status="used_up" if state.status == "active" and state.used_up else state.status,
        project=project,
        environment=environment,
        action=state.action,
        session_id=state.session_id,
        stream=state.stream,
        token_id=state.token_id,
        correlation_id=state.correlation_id,
        uses=state.uses,
        used=state.used,
        note=state.note,
        reason=state.reason,
        created_at=state.created_at,
        expires_at=state.expires_at,
        finished_at=state.finished_at,
        cursor=state.cursor,
    )


class NewAccess(msgspec.Struct, frozen=True, kw_only=True):
    """An access token that was just made, and its secret; None when it was made by an earlier try."""

    access: Access
    secret: str | None
