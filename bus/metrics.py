"""What Prometheus is told: every metric by name, and how the server counts them; their exposition is :mod:`bus.exposition`.

Labels have few values: projects, environments, tasks, queues, verbs, codes. No metric has a run, session or worker in a label.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter, defaultdict
from datetime import datetime
from typing import Any, Literal, NamedTuple

import msgspec
import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus import topology
from bus.live import LiveRuns
from bus.presence import Presence
from bus.requests import api
from bus.services.endpoint import Tally
from helmr import subjects
from helmr.errors import Unavailable
from helmr.events import TERMINAL
from helmr.subjects import Scope

#: Upper bounds of the buckets of times until a lease, in seconds: from an idle worker nearby to a long queue.
DISPATCH_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
)

_HISTORY_PATIENCE = 2.0
_EVERYWHERE = Scope("*", "*")
#: Any scope will do to ask the history how far it is.
_ANY = Scope("any", "any")


class Metric(NamedTuple):
    """A metric: its name as Prometheus knows it, kind, meaning and labels."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


class Histogram:
    """Observations in seconds, counted by bucket."""

    def __init__(self) -> None:
        self.counts = [0] * (len(DISPATCH_BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(DISPATCH_BUCKETS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, int]]:
        """Each upper bound, and how many observations are at or below it."""
        seen, listed = 0, []
        for bound, count in zip((*map(str, DISPATCH_BUCKETS), "+Inf"), self.counts, strict=True):
            seen += count
            listed.append((bound, seen))
        return listed


#: Values of a metric by those of its labels.
Values = dict[tuple[str, ...], Any]
Reading = list[tuple[Metric, Values]]

_SCOPE = ("project", "environment")
LIVE = Metric(
    "helmr_runs_live", "gauge", "Runs that have not ended: held, queued, running, waiting", (*_SCOPE, "task", "status")
)
ENDED = Metric(
    "helmr_runs_ended_total", "counter", "Runs that ended since the server began", (*_SCOPE, "task", "status")
)
FAILED = Metric(
    "helmr_runs_failed_total", "counter", "Runs that failed since the server began", (*_SCOPE, "task", "code")
)
DISPATCH = Metric("helmr_dispatch_seconds", "histogram", "From a run's being queued until a worker leased it", _SCOPE)
LEASES_LOST = Metric(
    "helmr_leases_lost_total", "counter", "Leases that were taken from workers which were gone", _SCOPE
)
QUEUE = Metric(
    "helmr_queue_runs",
    "gauge",
    "Runs that wait in a queue: held by a limit, or queued for a worker",
    (*_SCOPE, "queue", "state"),
)
WORKERS = Metric("helmr_workers", "gauge", "Workers that are alive", ("group",))
SLOTS = Metric("helmr_slots", "gauge", "Runs that the workers of a group can execute at a time", ("group",))
SLOTS_USED = Metric(
    "helmr_slots_used", "gauge", "Runs that the workers of a group execute, as of their last heartbeat", ("group",)
)
APPENDED = Metric(
    "helmr_stream_appended_total", "counter", "Messages ever appended to a stream; RUNS holds the events", ("stream",)
)
STORED = Metric("helmr_stream_bytes", "gauge", "Bytes that a stream holds", ("stream",))
HISTORY_UP = Metric("helmr_history_up", "gauge", "1 if the history answers, else 0")
LAG_MESSAGES = Metric(
    "helmr_history_lag_messages", "gauge", "Messages of a stream that the history has not applied", ("stream",)
)
LAG_SECONDS = Metric(
    "helmr_history_lag_seconds",
    "gauge",
    "How long ago the first message was stored that has not been applied; 0 when there is none",
    ("stream",),
)
REQUESTS = Metric(
    "helmr_api_requests_total",
    "counter",
    "Requests that this server answered; code is ok, or that of the error",
    ("noun", "verb", "code"),
)

SERVER = (
    *(LIVE, ENDED, FAILED, DISPATCH, LEASES_LOST, QUEUE, WORKERS, SLOTS, SLOTS_USED),
    *(APPENDED, STORED, HISTORY_UP, LAG_MESSAGES, LAG_SECONDS, REQUESTS),
)


class _State(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    task_id: str
    queued_at: datetime | None = None


class _Failure(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    code: str = "unknown"


class _Data(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    failure: _Failure | None = None


class _Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    at: datetime
    data: _Data
    state: _State


class ServerMetrics:
    """Counts what events tell, and reads the rest when it is asked for."""

    def __init__(self, nc: Nats, live: LiveRuns, presence: Presence, tally: Tally) -> None:
        self.nc = nc
        self._live = live
        self._presence = presence
        self._tally = tally
        self._ended: Counter[tuple[str, ...]] = Counter()
        self._failed: Counter[tuple[str, ...]] = Counter()
        self._lost: Counter[tuple[str, ...]] = Counter()
        self._dispatch: defaultdict[tuple[str, ...], Histogram] = defaultdict(Histogram)

    async def start(self) -> None:
        """Count from now on."""
        for kind in ("leased", "lease_lost", *sorted(TERMINAL)):
            await self.nc.subscribe(subjects.live(_EVERYWHERE, "run", "*", kind), cb=self._hear)

    async def _hear(self, msg: Msg) -> None:
        parsed = subjects.parse_event(msg.subject)
        self.take(parsed.scope, parsed.kind, msg.data)

    def take(self, scope: Scope, kind: str, body: bytes) -> None:
        """Count an event."""
        event = _decode(body)
        if kind == "lease_lost":
            self._lost[scope] += 1
        elif kind == "leased":
            if event.state.queued_at is not None:
                self._dispatch[scope].observe(max((event.at - event.state.queued_at).total_seconds(), 0.0))
        else:
            self._ended[*scope, event.state.task_id, kind] += 1
            if event.data.failure is not None:
                self._failed[*scope, event.state.task_id, event.data.failure.code] += 1

    async def read(self) -> Reading:
        """All values, as of now. What does not answer is left out."""
        streams, history = await asyncio.gather(self._streams(), self._history())
        return [*self._runs(), *self._workers(), *streams, *history, (REQUESTS, dict(self._tally.answers))]

    def _runs(self) -> Reading:
        live: Counter[tuple[str, ...]] = Counter()
        queues: Counter[tuple[str, ...]] = Counter()
        for run in self._live:
            state = run.state
            status = "held" if state.hold is not None else state.status
            live[*run.scope, state.task_id, status] += 1
            if status in {"held", "queued"}:
                queues[*run.scope, state.queue or "", status] += 1
        return [
            (LIVE, dict(live)),
            (QUEUE, dict(queues)),
            (ENDED, dict(self._ended)),
            (FAILED, dict(self._failed)),
            (LEASES_LOST, dict(self._lost)),
            (DISPATCH, dict(self._dispatch)),
        ]

    def _workers(self) -> Reading:
        counts: dict[Metric, Counter[tuple[str, ...]]] = {each: Counter() for each in (WORKERS, SLOTS, SLOTS_USED)}
        for worker in self._presence.alive().values():
            for metric, value in ((WORKERS, 1), (SLOTS, worker.slots), (SLOTS_USED, worker.running)):
                counts[metric][worker.group,] += value
        return [(metric, dict(values)) for metric, values in counts.items()]

    async def _streams(self) -> Reading:
        appended: Values = {}
        stored: Values = {}
        for name in (topology.RUNS, topology.SESSIONS, topology.LOGS):
            try:
                state = (await api(self.nc, f"STREAM.INFO.{name}", None))["state"]
            except (Unavailable, KeyError):
                continue
            appended[name,], stored[name,] = state["last_seq"], state["bytes"]
        return [(APPENDED, appended), (STORED, stored)]

    async def _history(self) -> Reading:
        try:
            subject = subjects.api(_ANY, "history", "status")
            answer = await self.nc.request(subject, b"{}", timeout=_HISTORY_PATIENCE)
            streams = msgspec.json.decode(answer.data)["streams"]
        except (nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError, KeyError):  # not up, or not well
            return [(HISTORY_UP, {(): 0})]
        behind: Values = {(name,): max(stream["last"] - stream["applied"], 0) for name, stream in streams.items()}
        lag: Values = {(name,): stream["lag_seconds"] for name, stream in streams.items()}
        return [(HISTORY_UP, {(): 1}), (LAG_MESSAGES, behind), (LAG_SECONDS, lag)]


_decode = msgspec.json.Decoder(_Event).decode
