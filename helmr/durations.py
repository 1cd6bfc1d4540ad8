"""Durations as people write them: ``90s``, ``15m``, ``2h``, ``7d``, ``1h30m``, a number of seconds, or a ``timedelta``."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from helmr.errors import UsageError

Duration = timedelta | str | int | float

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


def seconds(value: Duration, *, what: str = "duration") -> float:
    """The duration in seconds.

    Raises:
        UsageError: it is negative, not finite, or written in no known form.
    """
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, int | float):
        result = float(value)
    else:
        result = _parse(value.strip().lower(), what)
    if result < 0 or not math.isfinite(result):
        raise UsageError(f"{what} must be finite and not negative, not {value!r}")
    return result


def _parse(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    if not _WHOLE.fullmatch(text):
        raise UsageError(f"{what} {text!r} is not a duration", hint="write 90s, 15m, 2h, 7d, or a number of seconds")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def format_seconds(value: float) -> str:
    """A duration for people, two units at most: ``850ms``, ``4.2s``, ``3m 12s``, ``2h 5m``, ``3d 4h``."""
    if value < 0.9995:
        return f"{value * 1000:.0f}ms"
    if value < 59.95:
        return f"{value:.1f}s"
    whole = round(value)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}" + (f" {rest}{small}" if rest else "")
    return f"{whole}s"
