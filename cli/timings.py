"""Where the time of a run went, stage by stage, out of its events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import msgspec

from helmr import leases
from helmr.events import TERMINAL
from helmr.models import Event

#: What a run was doing after each kind of event; other kinds change nothing.
_DOING = {
    "held": "held",
    "queued": "queued",
    "leased": "preparing",
    "started": "running",
    "waiting": "waiting",
    "wait_completed": "woken",
    "wait_timed_out": "woken",
    "wait_cancelled": "woken",
    "retry_scheduled": "retry delay",
    "lease_lost": "lost",
}


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: ``at`` seconds after the run was made. Steps of ``preparing`` have its name and their own, with a dot."""

    stage: str
    at: float
    seconds: float
    attempt: int | None
    dispatch_attempt: int


def timings(events: Sequence[Event]) -> list[Timing]:
    """The stages of a run, in order; a stage that lasts is not among them."""
    marks = [event for event in events if event.kind in _DOING or event.kind in TERMINAL]
    going_on = leases.going_on(events)
    return [
        timing
        for begun, over in pairwise(marks)
        for timing in _between(marks[0], begun, over, "running" if begun.cursor in going_on else _DOING[begun.kind])
    ]


def _between(first: Event, begun: Event, over: Event, stage: str) -> Iterator[Timing]:
    at = (begun.at - first.at).total_seconds()
    make = partial(Timing, attempt=over.attempt, dispatch_attempt=over.dispatch_attempt)
    yield make(stage=stage, at=at, seconds=max((over.at - begun.at).total_seconds(), 0.0))
    steps = over.data.get("stages") if over.kind == "started" else None
    for name, seconds in (steps or {}).items():
        yield make(stage=f"{stage}.{name}", at=at, seconds=seconds)
        at += seconds
