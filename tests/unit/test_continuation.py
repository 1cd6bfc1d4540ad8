"""When input starts the next run of a session: never lost, never for ever."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr.events import Consumed, RunState
from helmr.reducers import consumption, continuation
from helmr.reducers import run as rules
from helmr.reducers.continuation import Newest
from tests.unit.runs import START, after, ended, queued, running, spec, waiting


def _last(sequence: int, *, second: float = 0) -> Newest:
    return Newest(sequence=sequence, seq=sequence * 10, at=START + timedelta(seconds=second))


def _consumed(*sequences: int) -> Consumed:
    found = Consumed()
    for sequence in sequences:
        found = consumption.take(found, sequence, sequence * 10)
    return found


def _ended(kind: str = "succeeded", **consumed: Consumed) -> RunState:
    state = after(queued(), rules.expire(queued(), ttl=5), 10) if kind == "expired" else ended(kind)
    return msgspec.structs.replace(state, consumed=consumed)


@pytest.mark.parametrize("state", [queued(), running(), waiting()], ids=["queued", "running", "waiting"])
def test_not_while_a_run_is_active(state: RunState) -> None:
    assert continuation.due(state, spec(), {"notes": _last(1)}) is None


@pytest.mark.parametrize("kind", ["succeeded", "failed"])
def test_unread_input_starts_the_next_run(kind: str) -> None:
    assert continuation.due(_ended(kind), spec(), {}) is None
    assert continuation.due(_ended(kind), spec(), {"notes": _last(2)}) == 20
    assert continuation.due(_ended(kind, notes=_consumed(1, 2)), spec(), {"notes": _last(2)}) is None
    assert continuation.due(_ended(kind, notes=_consumed(2)), spec(), {"notes": _last(2)}) == 20, "1 is unread"


def test_a_run_that_consumes_nothing_is_not_followed_by_another_for_the_same() -> None:
    started_for = spec(input_seq=20)
    assert continuation.due(_ended(), started_for, {"notes": _last(2)}) is None
    assert continuation.due(_ended(), started_for, {"notes": _last(3)}) == 30
    assert continuation.due(_ended(notes=_consumed(1)), started_for, {"notes": _last(2)}) == 20, "it made progress"


@pytest.mark.parametrize("kind", ["cancelled", "expired"])
def test_what_lay_there_when_a_run_was_given_up_starts_nothing(kind: str) -> None:
    state = _ended(kind)
    assert state.finished_at is not None
    before = (state.finished_at - START).total_seconds() - 1
    assert continuation.due(state, spec(), {"notes": _last(1, second=before)}) is None
    assert continuation.due(state, spec(), {"notes": _last(2, second=before + 2)}) == 20


def test_the_next_run_knows_what_was_consumed_and_does_not_expire() -> None:
    made = continuation.next_spec(_ended(notes=_consumed(1)), spec(ttl=5.0, payload=7), turn=3, input_seq=20)
    assert (made.turn, made.consumed, made.input_seq, made.ttl, made.payload) == (
        3,
        {"notes": _consumed(1)},
        20,
        None,
        7,
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_whatever_runs_do_it_comes_to_rest_and_nothing_new_is_overlooked(lives: list[tuple[int, int]]) -> None:
    """Each life: how much input comes while a run executes, and how much it consumes."""
    sent, consumed, last = 0, Consumed(), spec()
    input_seq: int | None = None
    for arriving, eaten in [*lives, *[(0, 0)] * 3]:
        before = sent
        sent += arriving
        for _ in range(eaten):
            unread = [n for n in range(1, sent + 1) if not consumption.has(consumed, n)]
            if unread:
                consumed = consumption.take(consumed, unread[0], unread[0] * 10)
        state: Any = _ended(notes=consumed) if consumed.ranges else _ended()
        newest = {"notes": _last(sent)} if sent else {}
        input_seq = continuation.due(state, last, newest)
        if arriving and sent > before and not consumption.complete(consumed, sent):
            assert input_seq is not None, "input came that is unread"
        if input_seq is not None:
            last = continuation.next_spec(state, last, turn=last.turn + 1, input_seq=input_seq)
    assert input_seq is None, "the last runs consumed nothing, and nothing came"
