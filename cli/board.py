"""What ``helmr top`` shows, folded from the runs there are at first and the events that follow; knows no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from helmr.events import TERMINAL, Status
from helmr.models import LiveRun, Queue

#: Seconds over which rates are counted.
WINDOW = 60.0
_RECENT = 8


class LiveState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The fields of an event's state that are shown."""

    id: str
    status: Status
    cursor: int
    task_id: str
    queue: str | None = None
    attempt: int | None = None
    lease: Holder | None = None
    hold: Held | None = None
    created_at: datetime
    queued_at: datetime | None = None
    finished_at: datetime | None = None


class Holder(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Who executes a run, and since when."""

    worker: str
    at: datetime


class Held(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A run is behind a limit."""

    limit: str


class LiveEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event, as far as it is shown."""

    kind: str
    at: datetime
    state: LiveState


class QueueLine(msgspec.Struct, frozen=True, kw_only=True):
    """A queue: its live runs by what they do, and how long the oldest held or queued one has, in seconds.

    ``queue`` is None for the runs of no queue; ``limit`` is how many may execute at a time, if that is limited.
    """

    queue: str | None
    limit: int | None
    held: int
    queued: int
    running: int
    waiting: int
    oldest_seconds: float


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """A run that is live, or has just ended; ``seconds`` since its lease, or from its start to its end."""

    id: str
    task_id: str
    status: Status
    attempt: int | None
    worker: str | None
    seconds: float


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment; ``rates`` are runs a minute, over the last one: started, and ended by status."""

    at: datetime
    totals: dict[str, int]
    rates: dict[str, float]
    queues: list[QueueLine]
    running: list[RunLine]
    recent: list[RunLine]


class Board:
    """The live runs of a scope. Events may come twice and before the runs that were asked for: cursors put them right."""

    def __init__(self, began: datetime) -> None:
        self._began = began
        self._runs: dict[str, LiveState] = {}
        self._ended: dict[str, int] = {}
        self._recent: deque[LiveState] = deque(maxlen=_RECENT)
        self._happened: deque[tuple[datetime, str]] = deque()
        self._limits: dict[str, int | None] = {}

    def begin(self, runs: Iterable[LiveRun], queues: Iterable[Queue] = ()) -> None:
        """Take the live runs as control knows them; what is known better from events stays, what is gone goes."""
        self._limits = {queue.name: queue.concurrency for queue in queues if queue.declared}
        listed = {run.id: _state(run) for run in runs}
        for run_id in self._runs.keys() - listed.keys():
            if self._runs[run_id].created_at < self._began:
                del self._runs[run_id]
        for run_id, state in listed.items():
            known = self._runs.get(run_id)
            if run_id not in self._ended and (known is None or known.cursor < state.cursor):
                self._runs[run_id] = state

    def take(self, event: LiveEvent) -> None:
        """Take one event."""
        state = event.state
        known = self._runs.get(state.id)
        if state.id in self._ended or (known is not None and known.cursor >= state.cursor):
            return
        if state.cursor == 1:
            self._happened.append((event.at, "started"))
        if state.status in TERMINAL:
            self._runs.pop(state.id, None)
            self._remember_end(state)
            self._happened.append((event.at, state.status))
        else:
            self._runs[state.id] = state

    def _remember_end(self, state: LiveState) -> None:
        self._recent.appendleft(state)
        self._ended[state.id] = state.cursor
        while len(self._ended) > 10_000:  # long enough for a list under way that still has them as live
            del self._ended[next(iter(self._ended))]

    def snapshot(self, now: datetime) -> Snapshot:
        """The present."""
        totals = dict.fromkeys(("held", "queued", "running", "waiting"), 0)
        for state in self._runs.values():
            totals[_doing(state)] += 1
        running = sorted((s for s in self._runs.values() if s.status == "running"), key=_since)
        return Snapshot(
            at=now,
            totals=totals,
            rates=self._rates(now),
            queues=self._queues(now),
            running=[_line(state, now) for state in running],
            recent=[_line(state, now) for state in self._recent],
        )

    def _rates(self, now: datetime) -> dict[str, float]:
        horizon = now - timedelta(seconds=WINDOW)
        while self._happened and self._happened[0][0] < horizon:
            self._happened.popleft()
        counts = dict.fromkeys(("started", *sorted(TERMINAL)), 0)
        for _, what in self._happened:
            counts[what] += 1
        watched = min(max((now - self._began).total_seconds(), 1.0), WINDOW)
        return {what: round(count * 60 / watched, 1) for what, count in counts.items()}

    def _queues(self, now: datetime) -> list[QueueLine]:
        queues: dict[str | None, list[LiveState]] = {name: [] for name in self._limits}
        for state in self._runs.values():
            queues.setdefault(state.queue, []).append(state)
        named = sorted(queues.items(), key=lambda item: (item[0] is None, item[0] or ""))
        return [_queue_line(name, self._limits.get(name or ""), states, now) for name, states in named]


def _state(run: LiveRun) -> LiveState:
    return LiveState(
        id=run.id,
        status=run.status,
        cursor=run.cursor,
        task_id=run.task_id,
        queue=run.queue,
        attempt=run.attempt,
        lease=Holder(worker=run.worker, at=run.leased_at) if run.worker and run.leased_at else None,
        hold=Held(limit=run.held_by) if run.held_by else None,
        created_at=run.created_at,
    )


def _doing(state: LiveState) -> str:
    return "held" if state.hold is not None else state.status


def _since(state: LiveState) -> datetime:
    return state.lease.at if state.lease is not None else state.created_at


def _queue_line(name: str | None, limit: int | None, states: list[LiveState], now: datetime) -> QueueLine:
    counts = dict.fromkeys(("held", "queued", "running", "waiting"), 0)
    for state in states:
        counts[_doing(state)] += 1
    waiting = [(now - (state.queued_at or state.created_at)).total_seconds() for state in states if _waits(state)]
    return QueueLine(queue=name, limit=limit, oldest_seconds=round(max(waiting, default=0.0), 1), **counts)


def _waits(state: LiveState) -> bool:
    return state.status == "queued"


def _line(state: LiveState, now: datetime) -> RunLine:
    seconds = ((state.finished_at or now) - _since(state)).total_seconds()
    return RunLine(
        id=state.id,
        task_id=state.task_id,
        status=state.status,
        attempt=state.attempt,
        worker=state.lease.worker if state.lease else None,
        seconds=round(max(seconds, 0.0), 1),
    )
