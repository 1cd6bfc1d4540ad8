"""The live runs: every run of every scope that has not ended, folded from the log's events into memory; and who has a slot.

It answers at once what the log could only be searched for: which runs are held, who holds a lease, what waits for what. It is
a cache and no authority: it may be a moment behind, and whoever acts on it appends with compare-and-set.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime

import msgspec

from bus.log import QUEUE, Position
from helmr import subjects
from helmr.events import TERMINAL, CancelRequest, Hold, Lease, QueueEvent, Status, Wait
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: The kinds that change what is kept here. The journal of a run (and ``started``) does not: most events are never looked at.
KINDS = (
    "held",
    "leased",
    "waiting",
    "wait_completed",
    "wait_timed_out",
    "wait_cancelled",
    "cancel_requested",
    "lease_lost",
    "retry_scheduled",
    *sorted(TERMINAL),
)
#: What of the log is followed, as filters over RUNS.
FILTERS = (
    subjects.lane("*"),
    *(subjects.of_kind("run", kind) for kind in KINDS),
    subjects.of_kind("queue", "*"),
    subjects.of_kind("session", "opened"),
)


class LiveState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The fields of :class:`helmr.events.RunState` that are worth their memory."""

    id: str
    status: Status
    cursor: int
    session_id: str
    deployment_id: str
    task_id: str
    attempt: int | None = None
    next_attempt: int = 1
    dispatch_attempt: int = 0
    dispatch: int | None = None
    lane: str | None = None
    hold: Hold | None = None
    slot: int | None = None
    lease: Lease | None = None
    cancel: CancelRequest | None = None
    wait: Wait | None = None
    queue: str | None = None
    priority: int = 0
    concurrency_key: str | None = None
    ttl: float | None = None
    max_duration: float = 900.0
    active_seconds: float = 0.0
    created_at: datetime
    queued_at: datetime | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the latest event said beside the state: a held run's limit, a lost lease's worker and reason, a retry's time."""

    limit: str | None = None
    worker: str | None = None
    reason: str | None = None
    at: datetime | None = None


class _Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    kind: str
    at: datetime
    data: Told
    state: LiveState


class LiveRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One live run as of its latest event that counts here, which stands in the stream at ``seq``."""

    scope: Scope
    seq: int
    kind: str
    at: datetime
    told: Told
    state: LiveState

    @property
    def id(self) -> str:
        """The run's id."""
        return self.state.id

    @property
    def holder(self) -> str | None:
        """The worker that has the run's lease."""
        return self.state.lease.worker if self.state.lease else None

    @property
    def in_lane(self) -> str | None:
        """The lane in which the run waits for a worker."""
        return self.state.lane if self.state.status == "queued" and self.state.dispatch is not None else None


class HalfStart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A session that was opened (by the event at ``seq``), and whose first run has not been seen yet."""

    scope: Scope
    seq: int
    session_id: str
    run_id: str
    at: datetime


class _Opening(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    run_id: str


class _Opened(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    session_id: str
    at: datetime
    data: _Opening


#: Called with a run before and after an event; None before its first one, and after its end.
Listener = Callable[[LiveRun | None, LiveRun | None], None]
QueueKey = tuple[Scope, str]
#: Called with a queue that somebody was given a slot of, or gave one up.
QueueListener = Callable[[QueueKey], None]


class LiveRuns:
    """The fold: :meth:`take` takes the messages under :data:`FILTERS` in the order of the stream.

    ``position`` is the sequence up to which everything is known: a run that is absent, and had an event at or before it, has
    ended.
    """

    def __init__(self) -> None:
        self.position = 0
        self._runs: dict[str, LiveRun] = {}
        self._leased: defaultdict[str, dict[str, LiveRun]] = defaultdict(dict)
        self._queues: dict[QueueKey, Position[QueueEvent]] = {}
        self._listeners: list[Listener] = []
        self._queue_listeners: list[QueueListener] = []
        self._decode = msgspec.json.Decoder(_Event).decode
        self._decode_opened = msgspec.json.Decoder(_Opened).decode
        #: Starts of which only the session is known, by the id of the run to come, oldest first.
        self.half_starts: dict[str, HalfStart] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[LiveRun]:
        """All live runs, as of now."""
        return iter(list(self._runs.values()))

    def get(self, run_id: str) -> LiveRun | None:
        """A run, if it is live."""
        return self._runs.get(run_id)

    def count(self, scope: Scope) -> dict[str, int]:
        """How many runs of a scope are held, queued, running and waiting."""
        found = {"held": 0, "queued": 0, "running": 0, "waiting": 0}
        for run in self._runs.values():
            if run.scope == scope:
                found["held" if run.state.hold is not None else run.state.status] += 1
        return found

    def leased(self) -> dict[str, list[LiveRun]]:
        """The runs that are being executed, by the worker that has the lease."""
        return {worker: list(runs.values()) for worker, runs in self._leased.items()}

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called on every change from now on, in the order of the log; it must return quickly."""
        self._listeners.append(listener)

    def queue(self, queue: QueueKey) -> Position[QueueEvent]:
        """The latest event of a queue that is known here; an empty position if none is."""
        return self._queues.get(queue, Position(0, None))

    def queues(self) -> list[QueueKey]:
        """The queues of which an event is known."""
        return list(self._queues)

    def held_queues(self) -> list[QueueKey]:
        """The queues of which somebody has a slot, as far as is known."""
        return [queue for queue, position in self._queues.items() if position.state.holders]

    def put_queue(self, queue: QueueKey, position: Position[QueueEvent]) -> None:
        """Take note of a queue's event that was read or appended; an older one than the known is nothing new."""
        if position.seq > self.queue(queue).seq:
            self._queues[queue] = position

    def listen_to_queues(self, listener: QueueListener) -> None:
        """Have ``listener`` called on every change of a queue; it must return quickly."""
        self._queue_listeners.append(listener)

    def take(self, seq: int, subject: str, body: bytes) -> None:
        """Fold one message. What cannot be understood is passed over: it must not keep us from all others."""
        self.position = max(self.position, seq)
        try:
            parsed = subjects.parse_event(subject)
            if parsed.entity == "queue":
                self._take_queue((parsed.scope, parsed.id), Position(seq, QUEUE.decode(body)))
                return
            if parsed.entity == "session":
                self._take_opened(parsed.scope, seq, body)
                return
            self.half_starts.pop(parsed.id, None)
            after = None if parsed.kind in TERMINAL else self._read(parsed.scope, seq, body)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("%s (#%s) cannot be understood: %s", subject, seq, error)
            return
        before = self._runs.get(parsed.id)
        if before is None and after is None:
            return
        self._put(parsed.id, before, after)
        for listener in self._listeners:
            listener(before, after)

    def _take_opened(self, scope: Scope, seq: int, body: bytes) -> None:
        """The run follows in the log, if all goes well."""
        opened = self._decode_opened(body)
        self.half_starts[opened.data.run_id] = HalfStart(
            scope=scope, seq=seq, session_id=opened.session_id, run_id=opened.data.run_id, at=opened.at
        )

    def _take_queue(self, queue: QueueKey, position: Position[QueueEvent]) -> None:
        self.put_queue(queue, position)
        for listener in self._queue_listeners:
            listener(queue)

    def _read(self, scope: Scope, seq: int, body: bytes) -> LiveRun:
        event = self._decode(body)
        return LiveRun(scope=scope, seq=seq, kind=event.kind, at=event.at, told=event.data, state=event.state)

    def _put(self, run_id: str, before: LiveRun | None, after: LiveRun | None) -> None:
        if before is not None and before.holder is not None:
            runs = self._leased[before.holder]
            del runs[run_id]
            if not runs:
                del self._leased[before.holder]
        if after is None:
            del self._runs[run_id]
            return
        self._runs[run_id] = after
        if after.holder is not None:
            self._leased[after.holder][run_id] = after
