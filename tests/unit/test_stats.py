"""The arithmetic of ``helmr stats``: charts, spans of time, and when a difference is one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cli import charts
from cli.comparison import ENOUGH, chance, compare
from cli.stats import Period


def test_a_sparkline_has_a_character_for_each_value() -> None:
    assert charts.sparkline([0, 1, 2, 4, None, 8]) == " ▂▃▅ █"
    assert charts.sparkline([5, 5]) == "██"
    assert charts.sparkline([0, 0]) == "  "
    assert charts.sparkline([]) == ""


@pytest.mark.parametrize(
    ("count", "seconds", "told"),
    [
        (5, 86_400, "5 a day"),
        (24, 86_400, "1 an hour"),
        (30, 86_400, "1.25 an hour"),
        (90, 60, "1.5 a second"),
        (150_000, 60, "2,500 a second"),
        (30, 3600, "30 an hour"),
        (1, 7 * 86_400, "1 a week"),
        (1, 365 * 86_400, "0.0822 a month"),
        (0, 3600, "0 a month"),
    ],
)
def test_a_rate_is_told_by_a_span_in_which_it_happens(count: int, seconds: int, told: str) -> None:
    assert charts.rate(count, seconds) == told


def test_a_bar_grows_by_eighths_and_never_vanishes() -> None:
    assert charts.bar(10, 10, 4) == "████"
    assert charts.bar(5, 10, 4) == "██"
    assert charts.bar(3.3, 10, 4) == "█▍"
    assert charts.bar(0.0001, 10, 4) == "▏"
    assert charts.bar(20, 10, 4) == "████"
    assert charts.bar(0, 10, 4) == ""
    assert charts.bar(1, 0, 4) == ""


def test_what_was_not_found_is_nothing() -> None:
    assert charts.fill([(0, 2), (2, 1), (2, 1), (7, 9), (-1, 9)], 3) == [2, 0, 2]


@pytest.mark.parametrize(
    ("seconds", "width"), [(60, 60), (3600, 60), (3601, 300), (86400, 3600), (7 * 86400, 4 * 3600), (1e9, 30 * 86400)]
)
def test_spans_are_as_wide_as_they_must_be(seconds: float, width: int) -> None:
    period = Period.last(seconds)
    assert period.width == width
    assert seconds > 1e8 or period.spans <= 61


def test_spans_begin_on_the_clock() -> None:
    period = Period(datetime(2026, 1, 1, 10, 30, tzinfo=UTC), datetime(2026, 1, 1, 12, 15, tzinfo=UTC), 3600)
    assert period.spans == 3
    assert [period.place(f"2026-01-01T{hour}:00:00Z") for hour in (10, 11, 12)] == [0, 1, 2]
    assert period.place((period.since - timedelta(hours=1)).isoformat()) == -1


def row(version: str, succeeded: int, failed: int, *, p50: float = 10.0, task: str = "review") -> dict[str, Any]:
    """A row as the history answers it."""
    runs = succeeded + failed
    rate = succeeded / runs if runs else None
    row: dict[str, Any] = {"task_id": task, "version": version, "runs": runs, "succeeded": succeeded, "failed": failed}
    row |= {"success_rate": rate, "retries": 0, "duration_p50": p50, "duration_p95": p50, "duration_p99": p50}
    return row | {"active_p50": p50, "ended": runs}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (row("1", 100, 0), row("2", 80, 20), "worse"),
        (row("1", 80, 20), row("2", 100, 0), "better"),
        (row("1", 100, 0), row("2", 99, 1), "same"),
        (row("1", 2, 0), row("2", 0, 2), "too few runs"),  # two runs prove nothing
        (row("1", 100, 0), row("2", 100, 0, p50=15.0), "worse"),
        (row("1", 100, 0), row("2", 100, 0, p50=5.0), "better"),
        (row("1", 100, 0), row("2", 100, 0, p50=11.0), "same"),
        (row("1", ENOUGH - 1, 0), row("2", 100, 0, p50=50.0), "too few runs"),
        (row("1", 100, 0), row("2", 80, 20, p50=5.0), "mixed"),
        (row("1", 0, 0), row("2", 80, 20), "too few runs"),
    ],
)
def test_a_difference_is_told_where_chance_is_no_likely_cause(
    a: dict[str, Any], b: dict[str, Any], verdict: str
) -> None:
    (compared,) = compare([a, b], "1", "2")
    assert compared.verdict == verdict
    assert bool(compared.reasons) == (verdict not in {"same", "too few runs"})


def test_a_task_of_one_version_alone_is_not_judged() -> None:
    first, second = compare([row("1", 5, 0, task="a"), row("2", 0, 5, task="b")], "1", "2")
    assert (first.task_id, first.verdict, first.b) == ("a", "only one side", None)
    assert (second.task_id, second.verdict, second.a) == ("b", "only one side", None)


def test_fishers_exact_test() -> None:
    # The tea lady: 3 of 4 right; and an often printed table.
    assert chance(3, 1, 1, 3) == pytest.approx(0.485714, abs=1e-6)
    assert chance(1, 9, 11, 3) == pytest.approx(0.002759, abs=1e-6)
    assert chance(10, 0, 10, 0) == pytest.approx(1.0)
    assert chance(100_000, 0, 99_000, 1_000) < 1e-100
