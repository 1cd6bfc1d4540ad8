"""The limits of a queue, rule by rule and under whatever order of events."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.log import QUEUE
from helmr.errors import Conflict
from helmr.events import Draft, Grant, QueueEvent, QueueState
from helmr.reducers import queue as rules
from helmr.reducers.queue import MAX_HOLDERS, Limits, Room

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def grant(held: int = 1, key: str | None = None) -> Grant:
    return Grant(held=held, seq=held * 10, key=key, at=NOW)


def after(state: QueueState | None, draft: Draft | None) -> QueueState:
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, NOW, queue_id="reviews")


def holding(*keys: str | None) -> QueueState:
    admit = {f"run_{n}": grant(key=key) for n, key in enumerate(keys)}
    return after(None, rules.change(None, Limits(), admit=admit, release={}))


@pytest.mark.parametrize(
    ("concurrency", "per_key", "expected"),
    [
        (None, None, Limits()),
        (4, None, Limits(per_key=4, keyless=4)),
        (None, 2, Limits(per_key=2)),
        (8, 2, Limits(total=8, per_key=2)),
    ],
)
def test_what_a_declaration_means(concurrency: int | None, per_key: int | None, expected: Limits) -> None:
    assert rules.limits(concurrency, per_key) == expected


@pytest.mark.parametrize(
    ("limits", "key", "binds"),
    [
        (Limits(), "a", False),
        (Limits(), None, False),
        (Limits(per_key=4, keyless=4), "a", True),
        (Limits(per_key=4, keyless=4), None, True),
        (Limits(per_key=2), None, False),
        (Limits(per_key=2), "a", True),
        (Limits(total=8, per_key=2), None, True),
    ],
)
def test_whom_a_limit_binds(limits: Limits, key: str | None, binds: bool) -> None:
    assert limits.bind(key) is binds


@pytest.mark.parametrize(
    ("limits", "keys", "key", "fits"),
    [
        (Limits(per_key=2, keyless=2), ["a", "a"], "a", False),
        (Limits(per_key=2, keyless=2), ["a", "a"], "b", True),
        (Limits(per_key=2, keyless=2), ["a", "a"], None, True),
        (Limits(per_key=2, keyless=2), [None, None], None, False),
        (Limits(total=3, per_key=2), ["a", "a", "b"], "b", False),
        (Limits(total=4, per_key=2), ["a", "a", "b"], "b", True),
        (Limits(total=4, per_key=2), ["a", "a", None], None, True),
        (Limits(per_key=1), ["a", None, None], None, True),
        (Limits(), ["a"] * 50, "a", True),
    ],
)
def test_who_fits(limits: Limits, keys: list[str | None], key: str | None, fits: bool) -> None:
    state = holding(*keys)
    assert Room(state, limits).fits(key) is fits
    if fits:
        assert len(after(state, rules.change(state, limits, admit={"new": grant(key=key)}, release={})).holders) > 0
    else:
        with pytest.raises(Conflict, match="limit"):
            rules.change(state, limits, admit={"new": grant(key=key)}, release={})


def test_runs_that_execute_without_a_grant_count_too() -> None:
    assert not Room(None, Limits(total=2, per_key=2), others=["a", "b"]).fits("c")
    with pytest.raises(Conflict):
        rules.change(None, Limits(per_key=1, keyless=1), admit={"r": grant(key="a")}, release={}, others=["a"])


def test_nobody_has_more_holders_than_fit_into_an_event() -> None:
    state = holding(*["a"] * MAX_HOLDERS)
    assert not Room(state, Limits()).fits("b")
    assert len(msgspec.json.encode(state)) < 200_000


def test_a_release_makes_room_in_the_same_event() -> None:
    state = holding("a")
    bounds = Limits(per_key=1, keyless=1)
    draft = rules.change(state, bounds, admit={"run_9": grant(key="a")}, release={"run_0": 1})
    assert draft is not None
    assert (draft.kind, draft.message) == ("admitted", "1 admitted, 1 released")
    assert set(after(state, draft).holders) == {"run_9"}


def test_what_stands_already_is_no_event() -> None:
    state = holding("a")
    assert rules.change(state, Limits(), admit={"run_0": grant(key="a")}, release={}) is None
    assert rules.change(state, Limits(), admit={}, release={"run_7": 1}) is None
    assert rules.change(None, Limits(), admit={}, release={}) is None


def test_word_of_an_earlier_life_takes_no_slot() -> None:
    state = after(holding("a"), rules.change(holding("a"), Limits(), admit={"run_0": grant(5, "a")}, release={}))
    assert state.holders["run_0"].held == 5
    assert rules.change(state, Limits(), admit={}, release={"run_0": 1}) is None
    assert rules.change(state, Limits(), admit={"run_0": grant(3, "a")}, release={}) is None
    released = rules.change(state, Limits(), admit={}, release={"run_0": 5})
    assert released is not None
    assert (released.kind, after(state, released).holders) == ("released", {})


def test_a_run_that_is_back_before_anybody_noticed_takes_no_second_slot() -> None:
    bounds = Limits(per_key=1, keyless=1)
    state = holding("a")
    again = after(state, rules.change(state, bounds, admit={"run_0": grant(5, "a")}, release={}))
    assert again.holders == {"run_0": grant(5, "a")}
    both = after(state, rules.change(state, bounds, admit={"run_0": grant(5, "a")}, release={"run_0": 1}))
    assert both.holders == {"run_0": grant(5, "a")}


def test_who_has_left_is_asked_for_each_grant() -> None:
    state = holding("a", "b", None)
    assert rules.left(state, lambda run_id, given: run_id == "run_1" and given.key == "b") == {"run_1": 1}


def test_other_events_do_not_follow() -> None:
    with pytest.raises(Conflict):
        rules.apply(None, "opened", {}, NOW)


_RUNS = st.sampled_from([f"run_{n}" for n in range(6)])
_KEYS = st.sampled_from([None, "a", "b"])
_BOUNDS = st.builds(rules.limits, st.none() | st.integers(1, 4), st.none() | st.integers(1, 3))


class QueueMachine(RuleBasedStateMachine):
    """Control processes that know more or less of the truth, all of them asking for changes."""

    @initialize(bounds=_BOUNDS)
    def begin(self, bounds: Limits) -> None:
        self.bounds = bounds
        self.state: QueueState | None = None
        self.cursors: Counter[str] = Counter()

    def _ask(self, admit: dict[str, Grant], release: dict[str, int]) -> None:
        try:
            draft = rules.change(self.state, self.bounds, admit=admit, release=release)
        except Conflict:
            return
        if draft is not None:
            before = self.state.cursor if self.state else 0
            self.state = rules.apply(self.state, draft.kind, draft.data, NOW, queue_id="q")
            assert self.state.cursor == before + 1
            event = QueueEvent(
                cursor=self.state.cursor,
                id="evt",
                queue_id="q",
                kind=draft.kind,
                at=NOW,
                data=draft.data,
                state=self.state,
            )
            assert QUEUE.decode(msgspec.json.encode(event)) == event

    @rule(run=_RUNS, key=_KEYS)
    def admit(self, run: str, key: str | None) -> None:
        self.cursors[run] += 1
        self._ask({run: grant(self.cursors[run], key)}, {})

    @rule(run=_RUNS, other=_RUNS, key=_KEYS)
    def swap(self, run: str, other: str, key: str | None) -> None:
        self.cursors[run] += 1
        self._ask({run: grant(self.cursors[run], key)}, {other: self.cursors[other]})

    @rule(run=_RUNS, behind=st.integers(0, 2))
    def release(self, run: str, behind: int) -> None:
        holders = self.state.holders if self.state else {}
        present = holders.get(run)
        self._ask({}, {run: self.cursors[run] - behind})
        now = (self.state.holders if self.state else {}).get(run)
        assert now == (None if present and present.held == self.cursors[run] - behind else present)

    @rule(run=_RUNS, key=_KEYS)
    def late_word(self, run: str, key: str | None) -> None:
        before = self.state
        if before is not None and run in before.holders:
            self._ask({run: grant(before.holders[run].held, key)}, {run: before.holders[run].held - 1})
            assert self.state == before

    @invariant()
    def the_limits_hold(self) -> None:
        holders = list(self.state.holders.values()) if getattr(self, "state", None) is not None and self.state else []
        used = Counter(each.key for each in holders)
        if holders:
            assert self.bounds.total is None or len(holders) <= self.bounds.total
            assert all((limit := self.bounds.of(key)) is None or count <= limit for key, count in used.items())


QueueMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase
