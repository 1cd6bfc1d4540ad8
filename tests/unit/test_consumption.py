"""Which records have been consumed, whatever the order they are taken in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helmr.events import Consumed
from helmr.reducers import consumption


@given(st.lists(st.integers(1, 30)))
def test_it_remembers_a_set_in_few_ranges(numbers: list[int]) -> None:
    consumed = Consumed()
    for number in numbers:
        consumed = consumption.take(consumed, number, number * 10)
    taken = set(numbers)
    assert {n for n in range(1, 40) if consumption.has(consumed, n)} == taken
    assert len(consumed.ranges) == sum(n - 1 not in taken for n in taken), "one range for each beginning"
    assert list(consumed.ranges) == sorted(consumed.ranges)


@given(st.permutations(range(1, 12)), st.integers(0, 11))
def test_what_is_still_to_come_lies_beyond_its_place_in_the_log(order: list[int], taken: int) -> None:
    consumed = Consumed()
    for number in order[:taken]:
        consumed = consumption.take(consumed, number, number * 10)
    unread = set(range(1, 12)) - set(order[:taken])
    assert all(number * 10 > consumed.seq for number in unread)
    assert consumption.complete(consumed, 11) == (not unread)


def test_a_stream_without_records_is_read_to_its_end() -> None:
    assert consumption.complete(Consumed(), 0)
    assert not consumption.complete(Consumed(), 1)
