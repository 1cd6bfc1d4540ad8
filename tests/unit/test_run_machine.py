"""Whatever happens to a run, in whatever order: a state machine that tries to break the rules."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bus.log import RUN
from helmr.errors import Conflict
from helmr.events import TERMINAL, Consumed, Draft, Failure, RetryPolicy, RunEvent, RunSpec, RunState, Wait
from helmr.reducers import consumption, run_fold
from helmr.reducers import run as rules
from tests.unit.runs import START, spec

_WORKERS = st.sampled_from(["wrk_a", "wrk_b", "wrk_c"])
_JOURNAL = st.sampled_from(["step", "output", "token_created", "log"])
_CODES = st.sampled_from(["task_error", "task_exit", "max_duration", "output_invalid", "image_error"])
_LANES = st.sampled_from(["default", "@wrk_a", "~host_1"])
_LIMITS = st.sampled_from([None, "queue", "backlog"])
_POLICIES = st.none() | st.builds(RetryPolicy, max_attempts=st.integers(1, 4), jitter=st.booleans())


class RunMachine(RuleBasedStateMachine):
    """One run, its log, and everything that may be asked of it at any time."""

    state: RunState
    spec: RunSpec

    def __init__(self) -> None:
        super().__init__()
        self.events: list[RunEvent] = []
        self.now = START
        self.spent = timedelta()
        self.consumed: set[int] = set()

    def _append(self, draft: Draft | None) -> None:
        """What a deciding function returns is always accepted; running time is added up beside it."""
        if draft is None:
            return
        before = self.state if self.events else None
        after = run_fold.apply(before, draft.kind, draft.data, self.now, run_id="run_1")
        if before is not None and before.lease is not None and before.lease != after.lease:
            self.spent += self.now - before.lease.at
        if before is not None:
            self._compare(before, after)
        self.state = after
        fields: dict[str, Any] = {"run_id": "run_1", "id": f"evt_{after.cursor}", "at": self.now}
        fields |= {"kind": draft.kind, "data": draft.data, "message": draft.message, "source": draft.source}
        fields |= {"cursor": after.cursor, "attempt": after.attempt, "dispatch_attempt": after.dispatch_attempt}
        self.events.append(RunEvent(state=after, **fields))

    def _compare(self, before: RunState, after: RunState) -> None:
        assert not before.terminal, "nothing follows a terminal event"
        assert after.cursor == before.cursor + 1
        assert (after.attempt or 0) >= (before.attempt or 0)
        assert after.attempt is None or (after.attempt or 0) - (before.attempt or 0) in {0, 1}
        if after.attempt == before.attempt and after.next_attempt == before.next_attempt:
            assert after.dispatch_attempt >= before.dispatch_attempt

    def _try(self, decide: Any, *args: Any, **kwargs: Any) -> None:
        """Ask for something that may be refused; a refusal must not come from ``apply``."""
        try:
            draft = decide(self.state, *args, **kwargs)
        except Conflict:
            return
        self._append(draft)

    @initialize(policy=_POLICIES, lane=_LANES, limit=_LIMITS, on_worker_lost=st.sampled_from(["redispatch", "fail"]))
    def start(self, policy: RetryPolicy | None, lane: str, limit: Any, on_worker_lost: Any) -> None:
        self.spec = spec(retry=policy, on_worker_lost=on_worker_lost, queue="reviews", ttl=5.0)
        self._append(rules.create(self.spec, cause="start", lane=lane, limit=limit))

    @rule(seconds=st.floats(0, 1000))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=round(seconds, 3))

    @rule(worker=_WORKERS, dispatch=st.integers(1, 12) | st.none())
    def lease(self, worker: str, dispatch: int | None) -> None:
        wanted = dispatch if dispatch is not None else self.state.dispatch or 0
        fits = self.state.status == "queued" and self.state.dispatch == wanted
        self._try(rules.lease, worker=worker, dispatch=wanted)
        if self.events[-1].kind == "leased" and self.state.status == "running":
            assert fits or self.state.lease is not None

    @rule(worker=_WORKERS, former=_WORKERS, execution=st.integers(1, 12) | st.none())
    def inherit(self, worker: str, former: str, execution: int | None) -> None:
        before, lease = self.state, self.state.lease
        wanted = execution if execution is not None or lease is None else lease.execution or lease.cursor
        self._try(rules.inherit, worker=worker, former=former, execution=wanted or 0)
        if self.state != before:
            assert lease is not None
            assert (lease.worker, self.state.lease and self.state.lease.worker) == (former, worker)
            assert wanted in {lease.cursor, lease.execution}, "nobody goes on with what is over"

    @precondition(lambda self: self.state.status == "running")
    @rule(began=st.booleans())
    def abandon(self, began: bool) -> None:
        wanted = self.state.cancel is not None
        self._append(rules.abandon(self.state, self.spec, reason="stopped", began=began, at=self.now))
        assert (self.state.status == "cancelled") == wanted

    @rule(lane=_LANES)
    def redispatch(self, lane: str) -> None:
        before = self.state
        self._try(rules.requeue, cause="redispatch", lane=lane)
        assert before.dispatch is not None or self.state == before, "nobody gets around a retry's delay"

    @precondition(lambda self: self.state.status == "queued" and self.state.dispatch is None)
    @rule(cause=st.sampled_from(["retry", "resume"]), limit=_LIMITS)
    def requeue(self, cause: Any, limit: Any) -> None:
        before = self.state
        self._try(rules.requeue, cause=cause, lane="default", limit=limit)
        assert before.hold is None or self.state == before, "nobody gets around a limit"

    @precondition(lambda self: self.state.hold is not None)
    @rule(older=st.booleans())
    def admit(self, older: bool) -> None:
        hold = self.state.hold
        assert hold is not None
        self._append(rules.admit(self.state, held=hold.cursor - older, lane="default"))
        assert (self.state.hold is None) is not older
        assert older or self.state.slot == (hold.cursor if hold.limit == "queue" else None)

    @rule(force=st.booleans(), alive=st.booleans())
    def cancel(self, force: bool, alive: bool) -> None:
        self._try(rules.cancel, reason="enough", force=force, holder_alive=alive)

    @rule()
    def expire(self) -> None:
        self._try(rules.expire, ttl=5.0)

    @precondition(lambda self: self.state.status == "running")
    @rule(kind=_JOURNAL)
    def journal(self, kind: str) -> None:
        self._append(Draft(kind=kind))

    @precondition(lambda self: self.state.status == "running")
    @rule(value=st.integers())
    def metadata(self, value: int) -> None:
        self._append(Draft(kind="metadata", data={"metadata": {"value": value}}))
        assert self.state.metadata == {"value": value}

    @rule(kind=st.sampled_from(["stream", "token", "timer"]), seconds=st.none() | st.integers(0, 500))
    def wait(self, kind: Any, seconds: int | None) -> None:
        due = None if seconds is None else self.now + timedelta(seconds=seconds)
        what: dict[str, Any] = {"stream": {"stream": "notes"}, "token": {"token": "tok_1"}, "timer": {}}[kind]
        before = self.state
        self._try(rules.wait, Wait(kind=kind, due=due, **what), n=1, main=True)
        if before.status == "running" and before.cancel is None:
            assert self.state.status == "waiting"
        else:
            assert self.state == before, "who is to end does not begin to wait"

    @precondition(lambda self: self.state.status == "waiting")
    @rule(ahead=st.integers(0, 3))
    def complete(self, ahead: int) -> None:
        wanted = self.state.wait
        assert wanted is not None
        record = {}
        if wanted.kind == "stream":
            sequence = ahead + next(n for n in range(1, 1000) if n not in self.consumed)
            record = {"sequence": sequence, "seq": sequence + 100, "data": {"n": sequence}}
            self.consumed.add(sequence)
        self._append(rules.complete_wait(self.state, **record))
        assert self.state.status == "queued"

    @rule()
    def time_out(self) -> None:
        wanted = self.state.wait
        self._try(rules.time_out_wait, at=self.now)
        if wanted is not None:
            over = wanted.due is not None and wanted.due <= self.now
            assert (self.state.status == "queued") == over

    @rule()
    def cancel_wait(self) -> None:
        self._try(rules.cancel_wait, reason="the token was cancelled")

    @precondition(lambda self: self.state.status == "running")
    @rule()
    def succeed(self) -> None:
        self._append(Draft(kind="succeeded", data={"output": {"n": 1}, "exit_code": 0}))

    @precondition(lambda self: self.state.status == "running")
    @rule(code=_CODES)
    def fail_attempt(self, code: Any) -> None:
        self._append(rules.end_attempt(self.state, self.spec, Failure(code=code, message="m"), at=self.now))

    @rule(kind=st.sampled_from(["started", "leased", "queued", "cancelled", "failed", "metadata", "unheard_of"]))
    def nothing_follows_the_end(self, kind: str) -> None:
        if self.state.terminal:
            with pytest.raises(Conflict):
                run_fold.apply(self.state, kind, {}, self.now)

    @invariant()
    def the_state_is_the_fold_of_the_events(self) -> None:
        state = None
        for number, event in enumerate(self.events, start=1):
            assert event.cursor == number
            state = run_fold.apply(state, event.kind, event.data, event.at, run_id="run_1")
            assert state == event.state
        assert not self.events or state == self.state

    @invariant()
    def there_is_one_holder_at_most_and_one_end_at_most(self) -> None:
        if not self.events:
            return
        assert (self.state.lease is not None) == (self.state.status == "running")
        assert (self.state.wait is not None) == (self.state.status == "waiting")
        assert sum(event.kind in TERMINAL for event in self.events) == self.state.terminal
        assert self.state.losses < rules.MAX_DISPATCH_ATTEMPTS
        assert self.state.losses <= self.state.dispatch_attempt
        assert (self.state.finished_at is not None) == self.state.terminal

    @invariant()
    def what_was_consumed_stays_consumed(self) -> None:
        if self.events:
            taken = self.state.consumed.get("notes", Consumed())
            assert sum(last - first + 1 for first, last in taken.ranges) == len(self.consumed)
            assert all(consumption.has(taken, n) for n in self.consumed)

    @invariant()
    def a_slot_is_used_from_admission_to_the_end_of_execution(self) -> None:
        if not self.events:
            return
        state = self.state
        assert state.hold is None or (state.status == "queued" and state.dispatch is None and state.slot is None)
        assert (
            state.slot is None or state.status == "running" or (state.status == "queued" and state.dispatch is not None)
        )
        assert state.ttl is None or state.attempt is None
        for event in self.events:
            if event.kind == "held":
                uses = state.slot == event.cursor
                granted = state.hold is not None and state.hold.cursor == event.cursor
                assert rules.has_left(state, held=event.cursor) is not (uses or granted)

    @invariant()
    def running_time_adds_up(self) -> None:
        if self.events:
            assert self.state.active_seconds == pytest.approx(self.spent.total_seconds(), abs=1e-3)

    @invariant()
    def an_event_survives_the_wire(self) -> None:
        if self.events:
            sent = self.events[-1]
            assert RUN.decode(msgspec.json.encode(sent)).state == sent.state


RunMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRunMachine = RunMachine.TestCase
