"""Durations as people write them, and as people read them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr.durations import Duration, format_seconds, seconds
from helmr.errors import UsageError


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("7d", 604_800),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        (" 5M ", 300),
        ("42", 42),
        (42, 42),
        (0.5, 0.5),
        (0, 0),
        (timedelta(minutes=2), 120),
    ],
)
def test_every_written_form_means_its_seconds(given_: Duration, expected: float) -> None:
    assert seconds(given_) == expected


@pytest.mark.parametrize("wrong", ["", "soon", "5 minutes", "1h 30m", "m5", "-5s", "1w", "5m!", "nan", "inf", "-inf"])
def test_anything_else_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(UsageError, match="ttl"):
        seconds(wrong, what="ttl")


@pytest.mark.parametrize("wrong", [-1, -0.5, timedelta(seconds=-1), float("nan"), float("inf")])
def test_a_duration_is_finite_and_not_negative(wrong: Duration) -> None:
    with pytest.raises(UsageError, match="duration"):
        seconds(wrong)


@given(st.integers(min_value=0, max_value=10**9))
def test_whole_seconds_survive_being_written(value: int) -> None:
    assert seconds(f"{value}s") == seconds(str(value)) == seconds(value) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0ms"),
        (0.85, "850ms"),
        (4.2, "4.2s"),
        (59.97, "1m"),
        (60, "1m"),
        (192, "3m 12s"),
        (3600, "1h"),
        (7500, "2h 5m"),
        (86_400, "1d"),
        (273_600, "3d 4h"),
        (0.9996, "1.0s"),
    ],
)
def test_people_read_two_units_at_most(value: float, shown: str) -> None:
    assert format_seconds(value) == shown
