"""The life of a run, rule by rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from helmr.errors import Conflict
from helmr.events import RUN_KINDS, TERMINAL, Draft, Failure, RetryPolicy, RunState, Wait
from helmr.reducers import run as rules
from helmr.reducers import run_fold
from tests.unit.runs import START, after, ended, leased, queued, running, spec, waiting

_STATES: dict[str, Callable[[], RunState]] = {
    "queued": queued,
    "running": running,
    "waiting": waiting,
    "succeeded": ended,
    "failed": lambda: ended("failed"),
    "cancelled": lambda: ended("cancelled"),
    "expired": lambda: after(queued(), rules.expire(queued(), ttl=1)),
}
#: DESIGN, "The run": which kinds may follow in which public status.
_MAY_FOLLOW = {
    "queued": {"held", "queued", "leased", "retry_scheduled", "failed", "cancelled", "expired"},
    "running": {
        *(
            "started",
            "waiting",
            "cancel_requested",
            "lease_lost",
            "retry_scheduled",
            "succeeded",
            "failed",
            "cancelled",
        ),
        *("step", "output", "metadata", "token_created", "log"),
    },
    "waiting": {"wait_completed", "wait_timed_out", "wait_cancelled", "failed", "cancelled"},
}
_DATA: dict[str, dict[str, Any]] = {
    "queued": {"cause": "redispatch", "lane": "default"},
    "held": {"cause": "retry", "lane": "default", "limit": "queue"},
    "leased": {"worker": "wrk_z"},
    "waiting": {"kind": "timer"},
    "metadata": {"metadata": {}},
    "retry_scheduled": {"attempt": 2, "at": START.isoformat()},
}
_TASK_ERROR = Failure(code="task_error", message="ValueError: no\nmore")


def _always() -> float:
    return 1.0


@pytest.mark.parametrize(("status", "kind"), list(itertools.product(_STATES, [*RUN_KINDS, "unheard_of"])))
def test_only_what_the_design_lists_may_follow(status: str, kind: str) -> None:
    state = _STATES[status]()
    assert state.status == status
    draft = Draft(kind=kind, data=_DATA.get(kind, {}))
    if kind in _MAY_FOLLOW.get(status, set()):
        assert after(state, draft, 20).cursor == state.cursor + 1
    else:
        with pytest.raises(Conflict) as refused:
            after(state, draft, 20)
        assert refused.value.details["status"] == status


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_a_run_begins_queued_or_held(kind: str) -> None:
    draft = rules.create(spec(), cause="start", lane="default", limit="queue" if kind == "held" else None)
    if kind in {"queued", "held"}:
        assert run_fold.apply(None, kind, draft.data, START, run_id="run_1").status == "queued"
    else:
        with pytest.raises(Conflict):
            run_fold.apply(None, kind, draft.data, START, run_id="run_1")


@pytest.mark.parametrize("kind", sorted(TERMINAL - {"expired"}))
def test_an_end_clears_what_only_a_living_run_has(kind: str) -> None:
    state = after(running(), Draft(kind=kind, data={"exit_code": 3}), 10)
    assert (state.lease, state.dispatch, state.wait) == (None, None, None)
    assert state.finished_at == START + timedelta(seconds=10)
    assert state.active_seconds == 10
    assert state.exit_code == 3


class TestLease:
    """Who executes."""

    def test_the_dispatch_message_leads_to_a_lease(self) -> None:
        state = leased(queued(), "wrk_a", 3)
        assert (state.status, state.attempt, state.dispatch_attempt) == ("running", 1, 1)
        assert rules.holds(state, worker="wrk_a", cursor=2)
        assert state.started_at == START + timedelta(seconds=3)

    @pytest.mark.parametrize(("worker", "cursor"), [("wrk_b", 2), ("wrk_a", 1), ("wrk_a", 3)])
    def test_nobody_else_holds_it(self, worker: str, cursor: int) -> None:
        assert not rules.holds(running(), worker=worker, cursor=cursor)

    def test_the_same_worker_does_not_hold_its_own_earlier_lease(self) -> None:
        first = running()
        second = leased(after(first, rules.lose_lease(first, reason="gone")), "wrk_a")
        assert not rules.holds(second, worker="wrk_a", cursor=2)
        assert rules.holds(second, worker="wrk_a", cursor=4)

    def test_a_stale_dispatch_message_leads_to_nothing(self) -> None:
        again = after(queued(), rules.requeue(queued(), cause="redispatch", lane="other"))
        with pytest.raises(Conflict, match="stale"):
            rules.lease(again, worker="wrk_a", dispatch=1)
        assert leased(again).lane == "other"

    def test_a_running_run_is_not_leased(self) -> None:
        with pytest.raises(Conflict, match="running"):
            rules.lease(running(), worker="wrk_b", dispatch=1)

    def test_a_lost_lease_keeps_the_attempt_and_the_dispatch_message(self) -> None:
        state = running()
        lost = after(state, rules.lose_lease(state, reason="gone"), 7)
        assert (lost.status, lost.attempt, lost.dispatch, lost.lease) == ("queued", 1, 1, None)
        assert lost.active_seconds == 7
        again = leased(lost, "wrk_b", 20)
        assert (again.attempt, again.dispatch_attempt) == (1, 2)
        assert again.started_at == START

    def test_after_five_lost_leases_there_is_no_sixth(self) -> None:
        last = state = queued()
        for number in range(1, rules.MAX_DISPATCH_ATTEMPTS + 1):
            state = leased(state)
            assert (state.status, state.dispatch_attempt) == ("running", number)
            last = state
            state = after(state, rules.abandon(state, spec(), reason="gone", began=True, at=START))
        assert state.status == "failed"
        end = rules.abandon(last, spec(), reason="gone", began=True, at=START)
        failure = end.data["failure"]
        assert (failure["code"], "5 times" in failure["message"]) == ("dispatch_exhausted", True)
        assert failure["message"].endswith("at last: gone")

    def test_stopping_workers_may_hand_a_run_back_as_often_as_they_like(self) -> None:
        state = queued()
        for _ in range(2 * rules.MAX_DISPATCH_ATTEMPTS):
            state = leased(state)
            state = after(state, rules.abandon(state, spec(), reason="stop", began=True, at=START, orderly=True))
            state = after(state, rules.requeue(state, cause="redispatch", lane="default"))
        assert (state.status, state.losses) == ("queued", 0)

    def test_only_leases_lost_in_a_row_count(self) -> None:
        state = running()
        for _ in range(rules.MAX_DISPATCH_ATTEMPTS + 1):
            state = after(state, rules.wait(state, Wait(kind="stream", stream="news")))
            state = after(state, rules.complete_wait(state, sequence=1, seq=1))
            state = leased(after(state, rules.requeue(state, cause="resume", lane="default")))
        assert state.dispatch_attempt > rules.MAX_DISPATCH_ATTEMPTS
        assert rules.abandon(state, spec(), reason="gone", began=True, at=START).kind == "lease_lost"


class TestInherit:
    """A worker that came after the holder goes on with the very process."""

    def test_the_lease_passes_on_at_once(self) -> None:
        state = after(running(), rules.inherit(running(), worker="wrk_b", former="wrk_a", execution=2), 7)
        assert (state.status, state.attempt, state.dispatch_attempt, state.losses) == ("running", 1, 2, 1)
        assert (state.active_seconds, state.dispatch) == (7, 3)
        lost = after(state, rules.lose_lease(state, reason="gone"))
        assert rules.requeue(lost, cause="redispatch", lane="other") is not None
        with pytest.raises(Conflict, match="stale"):
            rules.lease(lost, worker="wrk_c", dispatch=1)
        assert not rules.holds(state, worker="wrk_a", cursor=2)
        assert rules.holds(state, worker="wrk_b", cursor=3)
        third = after(state, rules.inherit(state, worker="wrk_c", former="wrk_b", execution=2), 9)
        assert (third.active_seconds, third.dispatch_attempt) == (9, 3)
        ended = after(third, Draft(kind="succeeded", data={}), 12)
        assert ended.active_seconds == 12

    @pytest.mark.parametrize(("former", "execution"), [("wrk_b", 2), ("wrk_a", 1), ("wrk_a", 0)])
    def test_only_from_the_holder_and_in_its_process(self, former: str, execution: int) -> None:
        with pytest.raises(Conflict, match="not executed"):
            rules.inherit(running(), worker="wrk_c", former=former, execution=execution)

    def test_a_process_that_was_kept_for_a_wait_counts_as_well(self) -> None:
        state = after(queued(), rules.lease(queued(), worker="wrk_a", dispatch=1, execution=1))
        assert rules.inherit(state, worker="wrk_b", former="wrk_a", execution=1).data["execution"] == 1

    @pytest.mark.parametrize("state", [queued(), waiting(), ended()])
    def test_only_while_it_runs(self, state: RunState) -> None:
        with pytest.raises(Conflict):
            rules.inherit(state, worker="wrk_b", former="wrk_a", execution=2)

    def test_a_lease_without_a_process_does_not_follow_another(self) -> None:
        with pytest.raises(Conflict):
            run_fold.apply(running(), "leased", {"worker": "wrk_b"}, START)

    def test_a_run_that_costs_every_worker_its_life_is_given_up(self) -> None:
        state = running()
        for number in range(1, rules.MAX_DISPATCH_ATTEMPTS):
            holder = state.lease.worker if state.lease else ""
            state = after(state, rules.inherit(state, worker=f"wrk_{number}", former=holder, execution=2))
        holder = state.lease.worker if state.lease else ""
        with pytest.raises(Conflict, match="5 times"):
            rules.inherit(state, worker="wrk_z", former=holder, execution=2)
        assert rules.abandon(state, spec(), reason="gone", began=True, at=START).kind == "failed"

    def test_a_cancel_that_was_asked_for_stays_so(self) -> None:
        state = after(running(), rules.cancel(running(), reason="enough", force=False, holder_alive=False))
        passed = after(state, rules.inherit(state, worker="wrk_b", former="wrk_a", execution=2))
        assert passed.cancel is not None


class TestCancel:
    """Somebody wants it to end."""

    @pytest.mark.parametrize("state", [queued(), waiting()], ids=["queued", "waiting"])
    @pytest.mark.parametrize("force", [False, True])
    def test_what_does_not_execute_ends_at_once(self, state: RunState, force: bool) -> None:
        draft = rules.cancel(state, reason="why", force=force, holder_alive=False)
        assert draft is not None
        assert (draft.kind, draft.data["reason"]) == ("cancelled", "why")
        assert after(state, draft, 20).status == "cancelled"

    @pytest.mark.parametrize(
        ("force", "alive", "kind"),
        [
            (False, True, "cancel_requested"),
            (False, False, "cancel_requested"),
            (True, True, "cancel_requested"),
            (True, False, "cancelled"),
        ],
    )
    def test_what_executes_is_asked_unless_nobody_is_there_to_ask(self, force: bool, alive: bool, kind: str) -> None:
        draft = rules.cancel(running(), reason=None, force=force, holder_alive=alive)
        assert draft is not None
        assert draft.kind == kind

    @pytest.mark.parametrize(
        ("first", "second", "said_again"),
        [(False, False, False), (False, True, True), (True, False, False), (True, True, False)],
    )
    def test_a_second_request_counts_only_when_it_asks_for_more(
        self, first: bool, second: bool, said_again: bool
    ) -> None:
        draft = rules.cancel(running(), reason="one", force=first, holder_alive=True)
        assert draft is not None
        asked = after(running(), draft)
        again = rules.cancel(asked, reason="two", force=second, holder_alive=True)
        assert (again is not None) is said_again

    @pytest.mark.parametrize("kind", sorted(TERMINAL - {"expired"}))
    def test_what_has_ended_cannot_be_cancelled(self, kind: str) -> None:
        with pytest.raises(Conflict, match="already"):
            rules.cancel(ended(kind), reason=None, force=True, holder_alive=True)


class TestRetry:
    """Another attempt."""

    @pytest.mark.parametrize(
        ("policy", "failure", "kind"),
        [
            (None, "task_error", "failed"),
            (RetryPolicy(max_attempts=1), "task_error", "failed"),
            (RetryPolicy(max_attempts=2), "task_error", "retry_scheduled"),
            (RetryPolicy(max_attempts=2), "worker_lost", "retry_scheduled"),
            (RetryPolicy(max_attempts=2), "output_invalid", "failed"),
            (RetryPolicy(max_attempts=2), "dispatch_exhausted", "failed"),
            (RetryPolicy(max_attempts=2, codes=("task_exit",)), "task_error", "failed"),
            (RetryPolicy(max_attempts=2, codes=("task_exit",)), "task_exit", "retry_scheduled"),
            (RetryPolicy(max_attempts=2, codes=("output_invalid",)), "output_invalid", "failed"),
        ],
    )
    def test_the_policy_decides(self, policy: RetryPolicy | None, failure: Any, kind: str) -> None:
        draft = rules.end_attempt(running(), spec(retry=policy), Failure(code=failure, message="m"), at=START)
        assert draft.kind == kind

    def test_a_cancelled_run_is_not_tried_again(self) -> None:
        asked = after(running(), Draft(kind="cancel_requested", data={}))
        draft = rules.end_attempt(asked, spec(retry=RetryPolicy(max_attempts=3)), _TASK_ERROR, at=START)
        assert draft.kind == "failed"

    def test_the_next_attempt_starts_counting_dispatches_anew(self) -> None:
        policy = RetryPolicy(max_attempts=2, jitter=False)
        state = leased(after(running(), rules.lose_lease(running(), reason="gone")))
        scheduled = after(state, rules.end_attempt(state, spec(retry=policy), _TASK_ERROR, at=START), 4)
        assert (scheduled.status, scheduled.attempt, scheduled.dispatch) == ("queued", 1, None)
        again = leased(after(scheduled, rules.requeue(scheduled, cause="retry", lane="default")))
        assert (again.attempt, again.dispatch_attempt) == (2, 1)

    def test_a_run_between_two_attempts_is_not_leased(self) -> None:
        state = running()
        draft = rules.end_attempt(state, spec(retry=RetryPolicy(max_attempts=2)), _TASK_ERROR, at=START)
        with pytest.raises(Conflict, match="stale"):
            rules.lease(after(state, draft), worker="wrk_a", dispatch=1)

    @pytest.mark.parametrize(("attempt", "seconds"), [(1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (60, 30)])
    def test_the_delay_doubles_up_to_its_limit(self, attempt: int, seconds: float) -> None:
        assert rules.retry_delay(RetryPolicy(max_attempts=99, jitter=False), attempt, _always) == seconds

    @pytest.mark.parametrize(("chance", "seconds"), [(0.0, 0), (0.5, 1), (1.0, 2)])
    def test_jitter_takes_any_part_of_it(self, chance: float, seconds: float) -> None:
        assert rules.retry_delay(RetryPolicy(max_attempts=9), 2, lambda: chance) == seconds

    def test_a_huge_number_of_attempts_does_not_overflow(self) -> None:
        assert rules.retry_delay(RetryPolicy(max_attempts=10**6, factor=10.0), 100_000, _always) == 30


class TestExpiry:
    """Not started in time."""

    def test_a_run_nobody_leased_expires(self) -> None:
        assert after(queued(), rules.expire(queued(), ttl=5), 5).status == "expired"

    def test_a_run_that_was_leased_once_does_not(self) -> None:
        lost = after(running(), rules.lose_lease(running(), reason="gone"))
        with pytest.raises(Conflict, match="leased before"):
            rules.expire(lost, ttl=5)

    @pytest.mark.parametrize("state", [running(), waiting(), ended()], ids=["running", "waiting", "ended"])
    def test_only_a_queued_run_does(self, state: RunState) -> None:
        with pytest.raises(Conflict):
            rules.expire(state, ttl=5)


def test_time_in_waiting_does_not_count_as_running() -> None:
    woken = after(waiting(), Draft(kind="wait_completed", data={}), 1000)
    again = leased(after(woken, rules.requeue(woken, cause="resume", lane="@wrk_a"), 1001), second=1002)
    assert after(again, Draft(kind="succeeded", data={}), 1005).active_seconds == 13


def test_a_clock_that_goes_backwards_takes_no_running_time_away() -> None:
    assert after(leased(queued(), second=10), Draft(kind="succeeded", data={}), 5).active_seconds == 0


def test_the_message_of_a_failure_is_its_first_line() -> None:
    draft = rules.fail(_TASK_ERROR, exit_code=1, logs={"stdout": 3})
    assert draft.message == "ValueError: no"
    assert draft.data == {
        "failure": {"code": "task_error", "message": "ValueError: no\nmore", "detail": {}, "retryable": True},
        "exit_code": 1,
        "logs": {"stdout": 3},
    }


def test_metadata_replaces_the_whole_document() -> None:
    state = after(running(metadata={"a": 1}), Draft(kind="metadata", data={"metadata": {"b": 2}}))
    assert state.metadata == {"b": 2}


class TestAbandon:
    """The holder does not go on."""

    def test_the_run_goes_back_to_the_queue(self) -> None:
        draft = rules.abandon(running(), spec(), reason="gone", began=True, at=START)
        assert (draft.kind, after(running(), draft).status) == ("lease_lost", "queued")

    @pytest.mark.parametrize("on_worker_lost", ["redispatch", "fail"])
    def test_a_run_that_was_to_end_ends(self, on_worker_lost: Any) -> None:
        asked = after(running(), Draft(kind="cancel_requested", data={"reason": "enough"}))
        draft = rules.abandon(asked, spec(on_worker_lost=on_worker_lost), reason="gone", began=True, at=START)
        assert (draft.kind, draft.data["reason"]) == ("cancelled", "enough")

    @pytest.mark.parametrize(
        ("retry", "began", "kind"),
        [
            (None, True, "failed"),
            (None, False, "lease_lost"),
            (RetryPolicy(max_attempts=2), True, "retry_scheduled"),
        ],
    )
    def test_what_may_not_begin_twice_fails_instead(self, retry: RetryPolicy | None, began: bool, kind: str) -> None:
        task = spec(on_worker_lost="fail", retry=retry)
        draft = rules.abandon(running(), task, reason="gone", began=began, at=START)
        assert draft.kind == kind
        assert kind == "lease_lost" or draft.data["failure"]["code"] == "worker_lost"
