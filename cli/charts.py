"""Small charts of text: a line of bars for a series, a bar for a share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def sparkline(values: Sequence[float | None]) -> str:
    """One character for each value, as high as it is beside the highest; a gap where there is none or it is 0."""
    top = max((value for value in values if value), default=0)
    return "".join(_level(value, top) for value in values)


def _level(value: float | None, top: float) -> str:
    if not value:
        return " "
    return _LEVELS[min(int(value / top * len(_LEVELS)), len(_LEVELS) - 1)]


def bar(value: float, top: float, width: int) -> str:
    """A bar of up to ``width`` characters, in eighths of one; a thin one for anything above 0."""
    if value <= 0 or top <= 0:
        return ""
    eighths = max(round(value / top * width * 8), 1)
    whole, rest = divmod(min(eighths, width * 8), 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def fill(found: Iterable[tuple[int, float]], count: int) -> list[float]:
    """``count`` values, 0 but for those found, which come with their place."""
    values = [0.0] * count
    for at, value in found:
        if 0 <= at < count:
            values[at] += value
    return values


_SPANS = ((1, "second"), (60, "minute"), (3600, "hour"), (86_400, "day"), (7 * 86_400, "week"), (30 * 86_400, "month"))


def rate(count: float, seconds: float) -> str:
    """How often something happened, by the shortest span of time in which it does at least once: ``5 a day``."""
    span, name = next((each for each in _SPANS if count * each[0] >= seconds), _SPANS[-1])
    value = count * span / seconds
    return f"{value:,.0f} {_article(name)} {name}" if value >= 100 else f"{value:.3g} {_article(name)} {name}"


def _article(noun: str) -> str:
    return "an" if noun == "hour" else "a"
