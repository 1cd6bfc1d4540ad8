"""The events of runs, sessions, workspaces, queues, tokens, execs, and the state each carries: the log's own vocabulary.

Every event holds the state that results from it, so the last message of an entity is its snapshot. What the events
mean, and which may follow which, is for :mod:`helmr.reducers` alone to say.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

Status = Literal["queued", "running", "waiting", "succeeded", "failed", "cancelled", "expired"]
Source = Literal["control", "worker", "task"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "expired"})

#: Why a run was (re)queued.
Cause = Literal["start", "input", "retry", "resume", "redispatch", "schedule"]

#: What holds a run back: its queue's limit, or that its lane is full enough already for others to be let in first.
Limit = Literal["queue", "backlog"]

#: Failure codes a run can end with (DESIGN: the run).
FailureCode = Literal[
    "task_error",
    "task_exit",
    "out_of_memory",
    "max_duration",
    "worker_lost",
    "dispatch_exhausted",
    "secret_missing",
    "image_error",
    "workspace_error",
    "output_invalid",
    "output_too_large",
    "disk_full",
    "nondeterminism",
]

RUN_KINDS = (
    "held",
    "queued",
    "leased",
    "started",
    "waiting",
    "wait_completed",
    "wait_timed_out",
    "wait_cancelled",
    "step",
    "output",
    "metadata",
    "token_created",
    "log",
    "cancel_requested",
    "lease_lost",
    "retry_scheduled",
    "succeeded",
    "failed",
    "cancelled",
    "expired",
)


def now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run failed; ``retryable``: a retry policy may act on this code."""

    code: FailureCode
    message: str
    detail: dict[str, Any] = {}
    retryable: bool = False


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When and how often a failed attempt is tried again; delays in seconds."""

    max_attempts: int = 1
    min_delay: float = 1.0
    max_delay: float = 30.0
    factor: float = 2.0
    jitter: bool = True
    codes: tuple[str, ...] | None = None  #: None: every retryable code


class Consumed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which records of an input stream the runs of a session have consumed, by their numbers.

    ``ranges`` holds first and last number of each unbroken range, in order. All records up to and including the one that the
    log holds at ``seq`` are consumed: what is still to come lies beyond.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    seq: int = 0


#: Bytes of JSON of a payload or an output that an event carries itself, and that they may have at all (DESIGN: limits).
INLINE_VALUE, MAX_VALUE = 512 * 1024, 16 * 1024**2
#: Bytes of a large value in one message: base64 makes them a third larger, and external servers take 1 MiB by default.
MESSAGE_PART = 512 * 1024


class ArtifactRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a value is stored that is too large for an event: its JSON, by sha-256 (hex), and how many bytes that has."""

    digest: str
    bytes: int


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run was started with: the ``data.spec`` of its first event, never changed afterwards. Times in seconds."""

    session_id: str
    workspace_id: str
    deployment_id: str
    deployment_version: str
    task_id: str
    turn: int = 0
    payload: Any = None
    payload_artifact: ArtifactRef | None = None  #: where a large payload is; then ``payload`` is None
    metadata: dict[str, Any] = {}
    tags: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    max_duration: float = 900.0
    ttl: float | None = None
    retry: RetryPolicy | None = None
    cancel_grace: float = 10.0
    on_worker_lost: Literal["redispatch", "fail"] = "redispatch"
    queue: str | None = None
    concurrency_key: str | None = None
    priority: int = 0
    external_id: str | None = None
    park_after: float = 60.0
    consumed: dict[str, Consumed] = {}  #: what earlier runs of the session have consumed, by stream
    input_seq: int = 0  #: the newest input there was when a continuing run was started; 0 for the first run


class Lease(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who executes the run: the worker, and the cursor of the ``leased`` event that made it so.

    ``execution`` is the cursor of the earlier lease whose process is to go on under this one; 0: there is none.
    """

    worker: str
    cursor: int
    at: datetime
    execution: int = 0


class Hold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What keeps a queued run from being dispatched, since the ``held`` event ``cursor``, and why it was queued then."""

    cursor: int
    limit: Limit
    cause: Cause


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Somebody wants an executing run to end."""

    reason: str | None = None
    force: bool = False


class Wait(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a waiting run waits for."""

    kind: Literal["stream", "token", "timer"]
    name: str = ""  #: by which the task's code will ask for it again
    stream: str | None = None
    token: str | None = None
    correlation_id: str | None = None
    due: datetime | None = None
    since: datetime | None = None


class RunState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of a run's events, small enough to travel in each of them.

    ``dispatch`` is the cursor of the ``queued`` event whose message may be leased (of the ``leased`` event itself, if that
    took over a process: then there is no message); None while the run is held, waits for a retry or must be queued again.
    ``slot`` is the cursor of the ``held`` event that its queue's grant was given for, for as long as the run uses it.
    ``queued_at`` is when its present time in the queue began, held time included; ``ttl`` (seconds) stands until the first
    lease. ``active_seconds`` is the time spent in ``running`` before the present lease. ``losses`` counts the leases in a row
    that were lost; ``consumed`` is what of the session's input has been.
    """

    id: str
    status: Status
    cursor: int
    session_id: str
    workspace_id: str
    deployment_id: str
    task_id: str
    turn: int = 0
    attempt: int | None = None
    next_attempt: int = 1
    dispatch_attempt: int = 0
    losses: int = 0
    dispatch: int | None = None
    lane: str | None = None
    hold: Hold | None = None
    slot: int | None = None
    lease: Lease | None = None
    cancel: CancelRequest | None = None
    wait: Wait | None = None
    consumed: dict[str, Consumed] = {}
    metadata: dict[str, Any] = {}
    queue: str | None = None
    priority: int = 0
    concurrency_key: str | None = None
    ttl: float | None = None
    max_duration: float = 900.0
    active_seconds: float = 0.0
    exit_code: int | None = None
    created_at: datetime
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def terminal(self) -> bool:
        """Whether the run has ended; nothing follows."""
        return self.status in TERMINAL


class RunEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a run; ``cursor`` counts the run's events from 1 without a gap."""

    cursor: int
    id: str
    run_id: str
    kind: str
    at: datetime
    attempt: int | None = None
    dispatch_attempt: int = 0
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: RunState


SessionStatus = Literal["open", "closed", "cancelled", "expired"]


class SessionState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of a session's events."""

    id: str
    status: SessionStatus
    cursor: int
    task_id: str
    workspace_id: str
    deployment_id: str
    run_id: str  #: the latest run
    turn: int = 0
    external_id: str | None = None
    fingerprint: str | None = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    created_at: datetime
    expires_at: datetime | None = None
    finished_at: datetime | None = None
    reason: str | None = None


class SessionEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a session: ``opened, turn, closed, cancelled, expired``."""

    cursor: int
    id: str
    session_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: SessionState


class Materialization(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a workspace is live."""

    worker: str
    ref: str = ""
    at: datetime


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a version is: the sha-256 of its manifest, its files and their bytes, and how many bytes were stored for it."""

    manifest: str
    files: int = 0
    bytes: int = 0
    stored: int = 0


class WorkspaceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of a workspace's events; ``host`` is where its files are, once they are anywhere.

    ``version`` and ``manifest`` are its latest version, as id and as sha-256. ``epoch`` counts how often its files had to
    be made anew from a version, because it was restored or has moved: a host whose copy is of an earlier epoch must not
    use it. ``unsaved`` says that the host has files that could not be stored, so that it must not move.
    """

    id: str
    status: Literal["active", "deleted"]
    cursor: int
    sandbox: str
    fingerprint: str = ""
    deployment_id: str = ""
    mount_path: str = "/workspace"
    materialization: Materialization | None = None
    host: str | None = None
    version: str | None = None
    manifest: str | None = None
    versions: int = 0  #: how many it has had
    epoch: int = 0
    unsaved: bool = False
    isolated: bool | None = None  #: whether it has lived between walls
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    created_at: datetime
    updated_at: datetime


class WorkspaceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a workspace.

    ``created, materialized, captured, uncaptured, stopped, unbound, restored, updated, deleted``.
    """

    cursor: int
    id: str
    workspace_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: WorkspaceState


class Grant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A slot of a queue, given to a run for the ``held`` event with cursor ``held`` and stream sequence ``seq``."""

    held: int
    seq: int
    key: str | None = None
    at: datetime


class QueueState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of a queue's events: who has a slot, by run id."""

    id: str
    cursor: int
    holders: dict[str, Grant] = {}
    updated_at: datetime


class QueueEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One change of who has a slot of a queue: ``admitted`` (which may release others, too) or ``released``."""

    cursor: int
    id: str
    queue_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: QueueState


TokenStatus = Literal["pending", "completed", "cancelled", "expired"]


class TokenState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of a token's events; ``secrets`` are sha-256 hashes, ``digest`` that of the data it was completed with."""

    id: str
    status: TokenStatus
    cursor: int
    expires_at: datetime
    run_id: str | None = None  #: the run that made it
    session_id: str | None = None
    waiters: tuple[str, ...] = ()  #: runs that wait for it, or have
    secrets: tuple[str, ...] = ()
    digest: str | None = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    reason: str | None = None
    created_at: datetime
    finished_at: datetime | None = None


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a token: ``created, awaited, secret_added, completed, cancelled, expired``."""

    cursor: int
    id: str
    token_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: TokenState


ExecStatus = Literal["starting", "running", "exited", "failed", "lost"]
EXEC_LIVE: frozenset[str] = frozenset({"starting", "running"})


class ExecState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The fold of an exec's events: a program that somebody runs in a workspace, beside its runs.

    ``failed``: it never began. ``lost``: its worker or its container went, and what came of it is not known. ``stdout`` and
    ``stderr`` are the bytes it wrote; ``kept`` says whether its output is stored.
    """

    id: str
    status: ExecStatus
    cursor: int
    workspace_id: str
    worker: str
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    terminal: bool = False
    kept: bool = True
    fingerprint: str = ""
    exit_code: int | None = None
    signal: int | None = None
    cause: str | None = None  #: as of :class:`worker.engine.Exited`
    oom: bool = False
    reason: str | None = None
    stdout: int | None = None
    stderr: int | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.status in EXEC_LIVE


class ExecEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to an exec: ``created, started, exited, failed, lost``."""

    cursor: int
    id: str
    exec_id: str
    kind: str
    at: datetime
    source: Source = "control"
    message: str = ""
    data: dict[str, Any] = {}
    state: ExecState


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a reducer decided on and nobody has appended yet."""

    kind: str
    data: dict[str, Any] = {}
    message: str = ""
    source: Source = "control"
