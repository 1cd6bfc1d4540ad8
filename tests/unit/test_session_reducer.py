"""The life of a session, rule by rule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from helmr.errors import Conflict
from helmr.events import Draft, SessionState, Status
from helmr.reducers import session as rules

_AT = datetime(2026, 3, 1, tzinfo=UTC)
_OPENED = {"task_id": "hello", "workspace_id": "ws_1", "deployment_id": "dep_1", "run_id": "run_1", "tags": ["a"]}
_ENDS = ("closed", "cancelled", "expired")


def _opened(**changes: Any) -> SessionState:
    return rules.apply(None, "opened", _OPENED | changes, _AT, session_id="ses_1")


def _after(state: SessionState, draft: Draft | None) -> SessionState:
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, _AT)


def test_a_session_begins_open() -> None:
    state = _opened(external_id="pr-42")
    assert (state.id, state.status, state.cursor, state.turn, state.tags) == ("ses_1", "open", 1, 0, ("a",))
    assert state.external_id == "pr-42"


@pytest.mark.parametrize("kind", ["turn", "unheard_of", *_ENDS])
def test_nothing_else_opens_one(kind: str) -> None:
    with pytest.raises(Conflict):
        rules.apply(None, kind, _OPENED, _AT, session_id="ses_1")


@pytest.mark.parametrize("end", _ENDS)
@pytest.mark.parametrize("kind", ["opened", "turn", *_ENDS])
def test_nothing_follows_an_end(end: str, kind: str) -> None:
    state = rules.apply(_opened(), end, {}, _AT)
    assert (state.status, state.finished_at, state.cursor) == (end, _AT, 2)
    with pytest.raises(Conflict) as refused:
        rules.apply(state, kind, {"run_id": "run_2", "turn": 1}, _AT)
    assert refused.value.details["status"] == end


@pytest.mark.parametrize("kind", ["opened", "unheard_of"])
def test_an_open_session_does_not_open_again(kind: str) -> None:
    with pytest.raises(Conflict):
        rules.apply(_opened(), kind, {}, _AT)


def test_a_turn_makes_the_next_run_the_current_one() -> None:
    state = rules.apply(_opened(), "turn", {"run_id": "run_2", "turn": 1}, _AT)
    assert (state.run_id, state.turn, state.status, state.cursor) == ("run_2", 1, "open", 2)


@pytest.mark.parametrize(
    ("run", "activity"),
    [
        (None, "idle"),
        ("queued", "queued"),
        ("running", "running"),
        ("waiting", "waiting"),
        ("succeeded", "idle"),
        ("failed", "idle"),
        ("cancelled", "idle"),
        ("expired", "idle"),
    ],
)
def test_the_activity_is_that_of_the_latest_run(run: Status | None, activity: str) -> None:
    assert rules.activity(run) == activity


@pytest.mark.parametrize("run", ["queued", "running", "waiting"])
def test_a_session_with_an_active_run_is_not_closed(run: Status) -> None:
    with pytest.raises(Conflict, match="active run run_1"):
        rules.close(_opened(), run_status=run)


def test_closing_twice_is_fine() -> None:
    closed = _after(_opened(), rules.close(_opened(), run_status="succeeded"))
    assert closed.status == "closed"
    assert rules.close(closed, run_status="succeeded") is None


def test_cancelling_twice_is_fine_and_keeps_the_first_reason() -> None:
    cancelled = _after(_opened(), rules.cancel(_opened(), reason="enough"))
    assert (cancelled.status, cancelled.reason) == ("cancelled", "enough")
    assert rules.cancel(cancelled, reason="more") is None


def test_what_ended_one_way_does_not_end_another() -> None:
    closed = _after(_opened(), rules.close(_opened(), run_status=None))
    with pytest.raises(Conflict):
        _after(closed, rules.cancel(closed, reason=None))
    cancelled = _after(_opened(), rules.cancel(_opened(), reason=None))
    with pytest.raises(Conflict):
        _after(cancelled, rules.close(cancelled, run_status=None))


def test_a_session_expires_when_its_time_has_come() -> None:
    state = _opened(expires_at=(_AT + timedelta(hours=1)).isoformat())
    with pytest.raises(Conflict, match="not due"):
        rules.expire(state, now=_AT + timedelta(minutes=59))
    expired = _after(state, rules.expire(state, now=_AT + timedelta(hours=1)))
    assert (expired.status, expired.reason) == ("expired", rules.EXPIRED)
    assert rules.expire(expired, now=_AT) is None


def test_what_has_ended_or_has_no_expiry_does_not_expire() -> None:
    with pytest.raises(Conflict, match="not due"):
        rules.expire(_opened(), now=_AT)
    closed = rules.apply(_opened(expires_at=_AT.isoformat()), "closed", {}, _AT)
    with pytest.raises(Conflict, match="closed already"):
        rules.expire(closed, now=_AT)
