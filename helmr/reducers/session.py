"""The life of a session: open until closed, cancelled or expired; its runs follow one another as turns."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from helmr.errors import Conflict
from helmr.events import Draft, SessionState, Status

Activity = Literal["idle", "queued", "running", "waiting"]

#: Why an expired session, and the run it had then, ended.
EXPIRED = "session expired"

_ENDS: dict[str, Literal["closed", "cancelled", "expired"]] = {
    "closed": "closed",
    "cancelled": "cancelled",
    "expired": "expired",
}


def apply(
    state: SessionState | None, kind: str, data: dict[str, Any], at: datetime, *, session_id: str = ""
) -> SessionState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow.
    """
    if state is None:
        if kind != "opened":
            raise Conflict(f"the first event of a session is opened, not {kind}")
        return msgspec.convert(
            {**data, "id": session_id, "status": "open", "cursor": 1, "created_at": at}, SessionState, strict=False
        )
    if state.status != "open":
        raise Conflict(f"session {state.id} is {state.status}: {kind} cannot follow", details={"status": state.status})
    if kind == "turn":
        return msgspec.structs.replace(state, run_id=data["run_id"], turn=data["turn"], cursor=state.cursor + 1)
    if kind not in _ENDS:
        raise Conflict(f"session {state.id} is open already")
    return msgspec.structs.replace(
        state, status=_ENDS[kind], finished_at=at, reason=data.get("reason"), cursor=state.cursor + 1
    )


def activity(run_status: Status | None) -> Activity:
    """What an open session does, derived from its latest run."""
    return run_status if run_status in {"queued", "running", "waiting"} else "idle"


def close(state: SessionState, *, run_status: Status | None) -> Draft | None:
    """Take no more input. None: it is closed already.

    Raises:
        Conflict: a run is still active, or the session ended otherwise.
    """
    if state.status == "closed":
        return None
    if activity(run_status) != "idle":
        raise Conflict(
            f"session {state.id} has an active run {state.run_id}",
            hint=f"wait for it (helmr run wait {state.run_id}) or cancel the session",
        )
    return Draft(kind="closed", message="closed")


def go_on(state: SessionState, *, run_id: str, input_seq: int) -> Draft:
    """The next run follows the latest one, because of the input that the log holds at ``input_seq``.

    Raises:
        Conflict: the session is not open.
    """
    if state.status != "open":
        raise Conflict(f"session {state.id} is {state.status}", details={"status": state.status})
    turn = state.turn + 1
    data = {"run_id": run_id, "turn": turn, "previous": state.run_id, "input_seq": input_seq}
    return Draft(kind="turn", data=data, message=f"turn {turn}: input came")


def cancel(state: SessionState, *, reason: str | None) -> Draft | None:
    """End the session; its current run is cancelled separately. None: it is cancelled already."""
    if state.status == "cancelled":
        return None
    return Draft(kind="cancelled", data={"reason": reason}, message=reason or "cancelled")


def expire(state: SessionState, *, now: datetime) -> Draft | None:
    """End a session whose time is up; its current run is cancelled separately. None: it has expired already.

    Raises:
        Conflict: it has ended otherwise, or its time has not come.
    """
    if state.status == "expired":
        return None
    if state.status != "open":
        raise Conflict(f"session {state.id} is {state.status} already", details={"status": state.status})
    if state.expires_at is None or now < state.expires_at:
        raise Conflict(f"session {state.id} is not due to expire")
    return Draft(kind="expired", data={"reason": EXPIRED}, message=EXPIRED)
