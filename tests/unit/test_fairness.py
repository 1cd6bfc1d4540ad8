"""Who is admitted next: turns between groups, rank within."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr.reducers.fairness import FairOrder, rank

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def anybody(_run_id: str) -> bool:
    return True


def at(second: float, run_id: str, priority: int = 0) -> tuple[float, str]:
    return rank(START + timedelta(seconds=second), priority, run_id)


def drain(order: FairOrder) -> list[str]:
    found = []
    while (run_id := order.pick(anybody)) is not None:
        found.append(run_id)
    return found


def test_one_run_of_a_small_tenant_is_not_behind_ten_thousand_of_a_big_one() -> None:
    order = FairOrder()
    for n in range(10_000):
        order.add(f"big_{n:05}", "big", at(n, f"big_{n:05}"))
    assert [order.pick(anybody) for _ in range(3)] == ["big_00000", "big_00001", "big_00002"]
    order.add("small", "small", at(20_000, "small"))
    assert order.ahead("small") == 1
    assert [order.pick(anybody) for _ in range(3)] == ["big_00003", "small", "big_00004"]
    assert len(order) == 10_000 - 5


def test_groups_take_turns_and_keep_their_own_order() -> None:
    order = FairOrder()
    for group, count in (("a", 5), ("b", 2), ("c", 1)):
        for n in range(count):
            order.add(f"{group}{n}", group, at(n, f"{group}{n}"))
    assert drain(order) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]


def test_priority_is_seconds_of_head_start_within_a_group() -> None:
    order = FairOrder()
    order.add("early", "g", at(0, "early"))
    order.add("urgent", "g", at(50, "urgent", priority=60))
    order.add("late and urgent", "g", at(70, "late and urgent", priority=60))
    order.add("humble", "g", at(0, "humble", priority=-5))
    assert drain(order) == ["urgent", "early", "humble", "late and urgent"]


def test_a_group_that_does_not_fit_is_passed_over_and_keeps_its_turn() -> None:
    order = FairOrder()
    for name in ("a0", "a1", "b0", "c0"):
        order.add(name, name[0], at(0, name))
    assert order.pick(lambda run_id: run_id[0] != "a") == "b0"
    assert order.pick(lambda _: False) is None
    assert drain(order) == ["a0", "c0", "a1"]


def test_a_run_is_there_once_and_can_be_taken_away() -> None:
    order = FairOrder()
    order.add("r", "a", at(0, "r"))
    order.add("r", "b", at(5, "r"))
    order.add("s", "a", at(1, "s"))
    assert (len(order), order.groups(), "r" in order) == (2, {"b": 1, "a": 1}, True)
    order.remove("r")
    order.remove("r")
    assert (drain(order), order.groups(), order.oldest()) == (["s"], {}, None)


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "pick"]),
        st.integers(0, 8),
        st.sampled_from("abc"),
        st.integers(0, 5),
        st.integers(-2, 2),
    ),
    max_size=60,
)


@given(_ACTIONS)
def test_whatever_happens_picks_agree_with_a_plain_model(actions: list[tuple[str, int, str, int, int]]) -> None:
    order, model, turns = FairOrder(), dict[str, tuple[str, tuple[float, str]]](), list[str]()

    def tidy() -> None:
        present = {group for group, _ in model.values()}
        turns[:] = [group for group in turns if group in present]

    for verb, number, group, second, priority in actions:
        run_id = f"run_{number}"
        if verb == "pick":
            expected = None
            if turns:
                expected = min(rank_ for each, rank_ in model.values() if each == turns[0])[1]
                turns.append(turns.pop(0))
                del model[expected]
            if expected is not None:
                assert order.ahead(expected) == 0
            assert order.pick(anybody) == expected
        else:
            model.pop(run_id, None)
            order.remove(run_id)
            if verb == "add":
                tidy()
                model[run_id] = (group, at(second, run_id, priority))
                order.add(run_id, group, model[run_id][1])
                if group not in turns:
                    turns.append(group)
        tidy()
        assert set(order) == set(model)
        assert order.oldest() == min((found for _, found in model.values()), default=None)
    positions = {run_id: order.ahead(run_id) for run_id in order}
    assert drain(order) == sorted(positions, key=lambda run_id: positions[run_id])


@pytest.mark.parametrize("priority", [0, 1, 3600, -3600])
def test_nobody_waits_for_ever(priority: int) -> None:
    """However urgent the newcomers are: from their head start on, those who arrive later come later."""
    waiting = at(0, "run_1")
    newcomer = at(priority + 1, "run_2", priority=priority)
    assert waiting < newcomer
