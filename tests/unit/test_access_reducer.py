"""The life of an access token: no use too many, none counted twice, none after its end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helmr.access import AccessState, access_record
from helmr.errors import Conflict, NotAllowed
from helmr.events import Draft
from helmr.reducers import access as rules

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
END = START + timedelta(hours=1)


def made(**changes: Any) -> AccessState:
    """An access token that nobody has used."""
    data = {"action": "append", "session_id": "ses_1", "stream": "s", "hash": "0" * 64, "expires_at": END.isoformat()}
    return rules.apply(None, "created", data | changes, START, access_id="acc_1")


def after(state: AccessState, draft: Draft | None, second: float = 0) -> AccessState:
    """The state after a draft."""
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, START + timedelta(seconds=second))


def used(state: AccessState, key: str) -> AccessState:
    """The state after a use that counts."""
    return after(state, rules.use(state, key=rules.key_of(key), at=START))


def test_the_first_event_makes_it() -> None:
    assert (made().status, made().used, made().uses) == ("active", 0, None)
    with pytest.raises(Conflict):
        rules.apply(None, "used", {}, START)


def test_uses_without_a_limit_are_not_counted() -> None:
    assert rules.use(made(), key="a", at=START) is None


def test_the_last_use_is_the_last_but_may_be_repeated() -> None:
    state = used(used(made(uses=2), "a"), "b")
    assert state.used == 2
    assert rules.use(state, key=rules.key_of("a"), at=START) is None
    with pytest.raises(NotAllowed):
        rules.use(state, key=rules.key_of("c"), at=START)
    with pytest.raises(Conflict):  # whatever a caller decided on the strength of an older state
        rules.apply(state, "used", {"key": "c"}, START)
    assert access_record("p", "e", state).status == "used_up"


def test_its_time_counts_even_when_its_timer_is_late() -> None:
    with pytest.raises(NotAllowed):
        rules.use(made(), key="a", at=END)
    assert rules.expire(made(), at=START) is None
    ended = after(made(), rules.expire(made(), at=END))
    assert ended.status == "expired"
    assert rules.expire(ended, at=END) is None


def test_a_revoked_one_stays_so_even_for_a_repetition() -> None:
    state = used(made(uses=2), "a")
    ended = after(state, rules.revoke(state, reason="lost"))
    assert (ended.status, ended.reason) == ("revoked", "lost")
    assert rules.revoke(ended, reason=None) is None
    with pytest.raises(NotAllowed):
        rules.use(ended, key=rules.key_of("a"), at=START)
    with pytest.raises(Conflict):
        rules.apply(ended, "expired", {}, START)


def test_other_events_do_not_follow() -> None:
    with pytest.raises(Conflict):
        rules.apply(made(), "created", {}, START)


class Uses(RuleBasedStateMachine):
    """Whoever uses it, however often and at what time: the count is that of the different uses, and never above the limit."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.state = made(uses=limit)
        self.limit = limit
        self.granted: set[str] = set()

    @rule(key=st.sampled_from("abcdef"), late=st.booleans())
    def use(self, key: str, late: bool) -> None:
        allowed = self.state.status == "active" and not late and (key in self.granted or len(self.granted) < self.limit)
        try:
            draft = rules.use(self.state, key=rules.key_of(key), at=END if late else START)
        except NotAllowed:
            assert not allowed
            return
        assert allowed
        assert (draft is None) == (key in self.granted)
        if draft is not None:
            self.state = after(self.state, draft)
            self.granted.add(key)

    @rule(how=st.sampled_from(["revoke", "expire"]))
    def end(self, how: str) -> None:
        draft = rules.revoke(self.state, reason=None) if how == "revoke" else rules.expire(self.state, at=END)
        assert (draft is None) == (self.state.status != "active")
        if draft is not None:
            self.state = after(self.state, draft)

    @invariant()
    def counted(self) -> None:
        assert self.state.used == len(self.granted) <= self.limit


TestUses = Uses.TestCase
