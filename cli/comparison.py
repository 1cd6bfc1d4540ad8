"""Two deployment versions of a task side by side, and whether their difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

#: Runs on both sides below which nothing is said about durations, nor that there is no difference.
ENOUGH = 20
#: A difference that chance alone brings about more often than this is none.
_SIGNIFICANT = 0.05
#: How much longer or shorter a median must be to be worth a word.
_NOTABLE = 1.2

Verdict = Literal["better", "worse", "mixed", "same", "too few runs", "only one side"]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """How a task did under one version; durations in seconds."""

    runs: int
    succeeded: int
    failed: int
    success_rate: float | None
    retries: int
    duration_p50: float | None
    duration_p95: float | None
    duration_p99: float | None
    active_p50: float | None


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One task under both versions; ``reasons`` say what the verdict rests on."""

    task_id: str
    a: Side | None
    b: Side | None
    verdict: Verdict
    reasons: list[str]


def compare(rows: Sequence[dict[str, Any]], a: str, b: str) -> list[Compared]:
    """The tasks of the rows of :data:`store.stats.COMPARE`, in their order."""
    sides: dict[str, dict[str, Side]] = {}
    for row in rows:
        sides.setdefault(row["task_id"], {})[row["version"]] = msgspec.convert(row, Side)
    return [_compared(task_id, found.get(a), found.get(b)) for task_id, found in sides.items()]


def _compared(task_id: str, a: Side | None, b: Side | None) -> Compared:
    if a is None or b is None:
        return Compared(task_id=task_id, a=a, b=b, verdict="only one side", reasons=[])
    findings = [found for found in (_success(a, b), _duration(a, b)) if found is not None]
    kinds = {kind for kind, _ in findings}
    verdict: Verdict = _nothing_found(a, b) if not kinds else "mixed" if len(kinds) > 1 else kinds.pop()
    return Compared(task_id=task_id, a=a, b=b, verdict=verdict, reasons=[reason for _, reason in findings])


def _nothing_found(a: Side, b: Side) -> Literal["same", "too few runs"]:
    return "same" if min(a.runs, b.runs) >= ENOUGH else "too few runs"


def _success(a: Side, b: Side) -> tuple[Literal["better", "worse"], str] | None:
    tried_a, tried_b = a.succeeded + a.failed, b.succeeded + b.failed
    if not tried_a or not tried_b or chance(a.succeeded, a.failed, b.succeeded, b.failed) > _SIGNIFICANT:
        return None
    difference = b.succeeded / tried_b - a.succeeded / tried_a
    return ("better" if difference > 0 else "worse"), f"success {difference * 100:+.1f} points"


def chance(succeeded_a: int, failed_a: int, succeeded_b: int, failed_b: int) -> float:
    """How likely a difference at least this unlikely is if both sides are the same: Fisher's exact test, two-sided."""
    tried_a, tried_b = succeeded_a + failed_a, succeeded_b + failed_b
    succeeded = succeeded_a + succeeded_b

    def likelihood(of_a: int) -> float:
        ways = _ways(tried_a, of_a) + _ways(tried_b, succeeded - of_a) - _ways(tried_a + tried_b, succeeded)
        return math.exp(ways)

    seen = likelihood(succeeded_a)
    possible = range(max(0, succeeded - tried_b), min(tried_a, succeeded) + 1)
    # What is as unlikely as what was seen counts, too, rounding or not.
    return min(sum(each for each in map(likelihood, possible) if each <= seen * (1 + 1e-7)), 1.0)


def _ways(total: int, chosen: int) -> float:
    """The logarithm of how many ways there are to choose so many of a total."""
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def _duration(a: Side, b: Side) -> tuple[Literal["better", "worse"], str] | None:
    if min(a.runs, b.runs) < ENOUGH or not a.duration_p50 or not b.duration_p50:
        return None
    times = b.duration_p50 / a.duration_p50
    if 1 / _NOTABLE < times < _NOTABLE:
        return None
    return ("better" if times < 1 else "worse"), f"median duration {times:.2f}x"
