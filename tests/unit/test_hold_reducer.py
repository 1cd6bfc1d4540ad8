"""Runs that are held, admitted, and keep or give up the slot they were given."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from helmr.errors import Conflict
from helmr.events import Draft, Hold, Limit, RunState
from helmr.reducers import run as rules
from tests.unit.runs import START, after, leased, queued, running, spec, waiting


def held(limit: Limit = "queue", **changes: Any) -> RunState:
    """A run that was held at its start."""
    return after(None, rules.create(spec(**changes), cause="start", lane="default", limit=limit))


def admitted(state: RunState, second: float = 0) -> RunState:
    assert state.hold is not None
    return after(state, rules.admit(state, held=state.hold.cursor, lane="default"), second)


def retried(state: RunState) -> RunState:
    return after(state, Draft(kind="retry_scheduled", data={"attempt": 2, "at": START.isoformat()}))


def test_a_held_run_is_queued_and_cannot_be_leased() -> None:
    state = held("queue", queue="reviews", concurrency_key="acme")
    assert (state.status, state.dispatch, state.lane) == ("queued", None, "default")
    assert state.hold == Hold(cursor=1, limit="queue", cause="start")
    with pytest.raises(Conflict, match="stale"):
        rules.lease(state, worker="wrk_a", dispatch=1)


def test_the_event_says_what_holds_it() -> None:
    draft = rules.create(spec(queue="reviews", concurrency_key="acme"), cause="start", lane="default", limit="queue")
    assert draft.kind == "held"
    assert {key: draft.data[key] for key in ("cause", "lane", "limit", "key")} == {
        "cause": "start",
        "lane": "default",
        "limit": "queue",
        "key": "acme",
    }
    assert "reviews" in draft.message
    assert "default" in rules.create(spec(), cause="start", lane="default", limit="backlog").message


@pytest.mark.parametrize(("limit", "slot"), [("queue", 1), ("backlog", None)])
def test_admission_dispatches_it_with_its_slot_and_its_time(limit: Limit, slot: int | None) -> None:
    state = admitted(held(limit), 30)
    assert (state.dispatch, state.hold, state.slot, state.queued_at) == (2, None, slot, START)
    assert leased(state).slot == slot


def test_admission_is_for_one_held_event() -> None:
    assert rules.admit(held(), held=2, lane="default") is None
    assert rules.admit(queued(), held=1, lane="default") is None


def test_the_cause_is_that_of_the_time_it_was_held() -> None:
    woken = after(waiting(), Draft(kind="wait_completed"))
    state = after(woken, rules.requeue(woken, cause="resume", lane="@wrk_a", limit="queue"))
    draft = rules.admit(state, held=state.cursor, lane="@wrk_a")
    assert draft is not None
    assert (draft.kind, draft.data) == ("queued", {"cause": "resume", "lane": "@wrk_a"})


def test_a_held_run_is_not_queued_around_its_limit() -> None:
    assert rules.requeue(held(), cause="redispatch", lane="default") is None
    assert rules.requeue(held(), cause="retry", lane="default", limit="queue") is None


def test_a_redispatch_keeps_the_slot_and_is_held_by_nothing() -> None:
    state = leased(admitted(held()))
    lost = after(state, rules.lose_lease(state, reason="gone"), 50)
    assert lost.slot == 1
    again = after(lost, rules.requeue(lost, cause="redispatch", lane="default", limit="queue"), 60)
    assert (again.slot, again.hold, again.queued_at) == (1, None, START + timedelta(seconds=60))
    assert leased(again).slot == 1


def woken(state: RunState) -> RunState:
    return after(after(state, Draft(kind="waiting", data={"kind": "timer"})), Draft(kind="wait_completed"))


@pytest.mark.parametrize("end", [retried, woken])
def test_a_run_that_gave_up_its_slot_is_not_redispatched_without_one(end: Any) -> None:
    """Its worker told how the attempt ended, and was taken for dead in the same moment."""
    assert rules.requeue(end(leased(admitted(held()))), cause="redispatch", lane="default") is None


@pytest.mark.parametrize(
    "leave",
    [
        lambda state: after(state, Draft(kind="waiting", data={"kind": "timer"})),
        retried,
        lambda state: after(state, Draft(kind="succeeded")),
        lambda state: after(state, rules.cancelled("enough")),
    ],
    ids=["waiting", "retry", "success", "cancel"],
)
def test_a_run_that_does_not_execute_has_no_slot(leave: Any) -> None:
    state = leave(leased(admitted(held())))
    assert state.slot is None
    assert rules.has_left(state, held=1)


def test_a_run_has_not_left_before_it_was_let_in() -> None:
    state = held()
    assert not rules.has_left(state, held=1), "held: the grant is to be carried out"
    assert not rules.has_left(admitted(state), held=1)
    assert not rules.has_left(leased(admitted(state)), held=1)
    assert not rules.has_left(state, held=7), "what we know is older than the grant"


def test_a_slot_of_an_earlier_time_is_not_taken_for_the_present_one() -> None:
    due = retried(leased(admitted(held())))
    again = after(due, rules.requeue(due, cause="retry", lane="default", limit="queue"))
    assert again.hold is not None
    assert rules.has_left(again, held=1)
    assert not rules.has_left(admitted(again), held=again.hold.cursor)
    assert rules.has_left(admitted(again), held=1)


def test_a_held_run_expires_and_is_cancelled_at_once() -> None:
    expired = after(held(ttl=5.0), rules.expire(held(ttl=5.0), ttl=5.0), 5)
    assert (expired.status, expired.hold) == ("expired", None)
    draft = rules.cancel(held(), reason="no", force=False, holder_alive=False)
    assert after(held(), draft).status == "cancelled"


def test_the_ttl_stands_until_the_first_lease() -> None:
    assert queued(ttl=5.0).ttl == 5.0
    assert running(ttl=5.0).ttl is None


def test_time_in_the_queue_begins_anew_after_a_wait_and_a_failed_attempt() -> None:
    for state in (after(waiting(), Draft(kind="wait_completed"), 20), retried(running())):
        again = after(state, rules.requeue(state, cause="resume", lane="default"), 40)
        assert again.queued_at == START + timedelta(seconds=40)
