"""Whether a session goes on: the rule by which input that no run has consumed starts the next one.

The danger on one side is an input that nobody ever looks at; on the other, a task that never looks at it and is started for it
again and again. So a run that consumed nothing is followed by another only for input that is newer than what it was started
for.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from helmr.events import Consumed, RunSpec, RunState
from helmr.reducers import consumption


class Newest(msgspec.Struct, frozen=True, kw_only=True):
    """The last record of an input stream: its number, its place in the log, and when it was sent."""

    sequence: int
    seq: int
    at: datetime


def due(run: RunState, spec: RunSpec, newest: Mapping[str, Newest]) -> int | None:
    """The place of the newest input that the next run of the session is to be started for; None: it is not.

    ``run`` is the latest one, and ``spec`` what it was started with; ``newest`` has the input streams that are not empty.
    """
    if not run.terminal:
        return None
    unread = [
        last
        for stream, last in newest.items()
        if not consumption.complete(run.consumed.get(stream, Consumed()), last.sequence)
    ]
    if run.status in {"cancelled", "expired"}:  # what lay there then was given up with it
        unread = [last for last in unread if run.finished_at is None or last.at > run.finished_at]
    if not unread:
        return None
    latest = max(last.seq for last in unread)
    return latest if latest > spec.input_seq or run.consumed != spec.consumed else None


def next_spec(run: RunState, spec: RunSpec, *, turn: int, input_seq: int) -> RunSpec:
    """What the next run is started with: the same, knowing what has been consumed. Input does not expire."""
    return msgspec.structs.replace(spec, turn=turn, consumed=run.consumed, input_seq=input_seq, ttl=None)
