"""The life of a token: one end, and one completion however often it is said."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helmr.errors import Conflict
from helmr.events import Draft, TokenState
from helmr.reducers import token as rules

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
_DATA = st.sampled_from([None, 1, {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, {"a": 2}])


def made(**changes: Any) -> TokenState:
    """A token that nobody has completed."""
    data = {"expires_at": (START + timedelta(hours=1)).isoformat(), "run_id": "run_1"} | changes
    return rules.apply(None, "created", data, START, token_id="tok_1")  # noqa: S106


def after(state: TokenState, draft: Draft | None, second: float = 0) -> TokenState:
    """The state after a draft."""
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, START + timedelta(seconds=second))


def test_the_first_event_makes_it() -> None:
    assert made().status == "pending"
    with pytest.raises(Conflict):
        rules.apply(None, "completed", {}, START)


def test_the_same_data_completes_it_once_whatever_the_order_of_keys() -> None:
    state = after(made(), rules.complete(made(), {"a": 1, "b": 2}, at=START))
    assert state.status == "completed"
    assert rules.complete(state, {"b": 2, "a": 1}, at=START) is None
    assert rules.complete(state, {"b": 2, "a": 1}, at=START + timedelta(days=9)) is None
    with pytest.raises(Conflict, match="other data"):
        rules.complete(state, {"a": 1}, at=START)


def test_its_time_counts_even_when_its_timer_is_late() -> None:
    late = START + timedelta(hours=2)
    with pytest.raises(Conflict, match="expired") as refused:
        rules.complete(made(), 1, at=late)
    assert refused.value.details == {"status": "expired"}
    assert rules.expire(made(), at=START) is None
    assert after(made(), rules.expire(made(), at=late)).status == "expired"


def test_the_run_that_made_it_need_not_say_that_it_waits() -> None:
    assert rules.await_(made(), run_id="run_1") is None
    other = after(made(), rules.await_(made(), run_id="run_2"))
    assert other.waiters == ("run_2",)
    assert rules.await_(other, run_id="run_2") is None


def test_it_has_several_secrets_and_not_too_many() -> None:
    state = made(secrets=["h0"])
    for n in range(1, 10):
        state = after(state, rules.add_secret(state, hashed=f"h{n}"))
    assert state.secrets == tuple(f"h{n}" for n in range(2, 10))


class TokenMachine(RuleBasedStateMachine):
    """Everything that may be asked of a token, at any time."""

    state: TokenState

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.ends: list[str] = []

    @initialize()
    def make(self) -> None:
        self.state = made()

    def _try(self, decide: Any, *args: Any, **kwargs: Any) -> None:
        try:
            draft = decide(self.state, *args, **kwargs)
        except Conflict:
            return
        if draft is not None:
            self.state = rules.apply(self.state, draft.kind, draft.data, self.now)
            if self.state.status != "pending":
                self.ends.append(draft.kind)

    @rule(seconds=st.integers(0, 3000))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(data=_DATA)
    def complete(self, data: Any) -> None:
        self._try(rules.complete, data, at=self.now)
        if self.state.status == "completed" and self.state.digest == rules.digest(data):
            assert rules.complete(self.state, data, at=self.now) is None

    @rule()
    def cancel(self) -> None:
        self._try(rules.cancel, reason="no need")

    @rule()
    def expire(self) -> None:
        self._try(rules.expire, at=self.now)

    @rule(run=st.sampled_from(["run_1", "run_2"]))
    def await_(self, run: str) -> None:
        self._try(rules.await_, run_id=run)

    @rule()
    def add_secret(self) -> None:
        self._try(rules.add_secret, hashed="h")

    @invariant()
    def it_ends_once(self) -> None:
        assert len(self.ends) <= 1
        assert len(self.state.secrets) <= rules.MAX_SECRETS
        assert (self.state.finished_at is not None) == bool(self.ends)


TestTokenMachine = TokenMachine.TestCase
