"""Ids: prefixed, ordered by time, safe as one token of a subject, and derivable from a request."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr import ids

_SAFE = re.compile(r"[a-z]+_[0-9a-hjkmnp-tv-z]{24}")
_TIMES = st.integers(min_value=0, max_value=2**48)


@pytest.mark.parametrize("prefix", ids.PREFIXES)
def test_a_new_id_is_one_safe_token_with_its_prefix(prefix: str) -> None:
    made = ids.new(prefix)
    assert _SAFE.fullmatch(made)
    assert ids.is_id(made, prefix)


def test_an_id_holds_the_time_it_was_made() -> None:
    before = time.time_ns() // 1_000_000
    made = ids.time_ms(ids.new("run"))
    assert before <= made <= time.time_ns() // 1_000_000


def test_many_ids_of_one_millisecond_differ() -> None:
    assert len({ids.new("run") for _ in range(10_000)}) == 10_000


@given(st.text(), st.text(), _TIMES)
def test_the_same_request_leads_to_the_same_id(project: str, request: str, at: int) -> None:
    first, second = (ids.derive("run", project, request, at_ms=at) for _ in range(2))
    assert first == second
    assert _SAFE.fullmatch(first)
    assert ids.time_ms(first) == at


@given(_TIMES, _TIMES)
def test_derived_ids_sort_by_the_time_of_their_request(one: int, other: int) -> None:
    earlier, later = sorted((one, other))
    assert ids.derive("run", "a", at_ms=earlier)[:14] <= ids.derive("run", "b", at_ms=later)[:14]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("run", "a", "bc"), ("run", "ab", "c")),
        (("run", "a"), ("ses", "a")),
        (("run", "a"), ("run", "a", "")),
    ],
)
def test_different_parts_lead_to_different_ids(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert ids.derive(*one).partition("_")[2] != ids.derive(*other).partition("_")[2]


@pytest.mark.parametrize("text", ["", "run", "run_", "run_01jd3v", "@last", "ses_" + "0" * 24, "run_" + "u" * 24])
def test_what_is_not_a_whole_id_is_recognised(text: str) -> None:
    assert not ids.is_id(text, "run")
