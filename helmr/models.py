"""The records users see: what ``--json`` prints and the client returns. Keys and meaning are a public contract.

Times are tz-aware UTC; durations are seconds.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from helmr.events import (
    EXEC_LIVE,
    ArtifactRef,
    CancelRequest,
    ExecState,
    ExecStatus,
    Failure,
    RunEvent,
    RunSpec,
    RunState,
    SessionState,
    Status,
    TokenEvent,
    Wait,
    WorkspaceState,
)
from helmr.reducers.session import Activity, activity

#: The only key of a payload that stands for a large one: with where that is.
ELSEWHERE = "$artifact"


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One execution for a session."""

    id: str
    status: Status
    task_id: str
    project: str
    environment: str
    session_id: str
    turn: int
    workspace_id: str
    deployment_id: str
    deployment_version: str
    payload: Any
    output: Any
    failure: Failure | None
    metadata: dict[str, Any]
    tags: tuple[str, ...]
    secrets: tuple[str, ...]
    max_duration: float
    attempt: int | None
    dispatch_attempt: int
    queue: str | None
    priority: int
    concurrency_key: str | None
    ttl: float | None
    cancel_requested: CancelRequest | None
    pending_wait: Wait | None
    exit_code: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    active_seconds: float
    cursor: int
    #: Where a large output is; ``runs.get`` and ``runs.wait`` fetch it into ``output``, as long as the log has the run.
    output_artifact: ArtifactRef | None = None


class LiveRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run that has not ended, in a few words; ``held_by`` names the limit it is behind.

    ``worker`` and ``leased_at`` are of its present lease; ``cursor`` may leave out the latest entries of its journal.
    """

    id: str
    status: Status
    cursor: int
    task_id: str
    queue: str | None
    held_by: str | None
    attempt: int | None
    worker: str | None
    leased_at: datetime | None
    created_at: datetime


def run_record(project: str, environment: str, spec: RunSpec, last: RunEvent) -> Run:
    """The run record, from what the run was started with and its latest event."""
    state: RunState = last.state
    failure = last.data.get("failure") if state.status == "failed" else None
    elsewhere = last.data.get("output_artifact") if state.status == "succeeded" else None
    return Run(
        id=state.id,
        status=state.status,
        task_id=state.task_id,
        project=project,
        environment=environment,
        session_id=state.session_id,
        turn=state.turn,
        workspace_id=state.workspace_id,
        deployment_id=state.deployment_id,
        deployment_version=spec.deployment_version,
        payload=spec.payload
        if spec.payload_artifact is None
        else {ELSEWHERE: msgspec.to_builtins(spec.payload_artifact)},
        output=last.data.get("output") if state.status == "succeeded" else None,
        failure=msgspec.convert(failure, Failure) if failure else None,
        metadata=state.metadata,
        tags=spec.tags,
        secrets=spec.secrets,
        max_duration=state.max_duration,
        attempt=state.attempt,
        dispatch_attempt=state.dispatch_attempt,
        queue=state.queue,
        priority=state.priority,
        concurrency_key=state.concurrency_key,
        ttl=spec.ttl,
        cancel_requested=state.cancel,
        pending_wait=state.wait,
        exit_code=state.exit_code,
        created_at=state.created_at,
        started_at=state.started_at,
        finished_at=state.finished_at,
        active_seconds=round(state.active_seconds, 6),
        cursor=state.cursor,
        output_artifact=msgspec.convert(elsewhere, ArtifactRef) if elsewhere else None,
    )


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a run."""

    cursor: int
    id: str
    run_id: str
    kind: str
    at: datetime
    attempt: int | None
    dispatch_attempt: int
    source: str
    message: str
    data: dict[str, Any]


def event_record(event: RunEvent) -> Event:
    """The public part of a stored event (its state is for Helmr itself)."""
    return Event(
        cursor=event.cursor,
        id=event.id,
        run_id=event.run_id,
        kind=event.kind,
        at=event.at,
        attempt=event.attempt,
        dispatch_attempt=event.dispatch_attempt,
        source=event.source,
        message=event.message,
        data=event.data,
    )


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation or job: ordered runs of one task on one workspace."""

    id: str
    status: Literal["open", "closed", "cancelled", "expired"]
    activity: Activity
    task_id: str
    project: str
    environment: str
    external_id: str | None
    workspace_id: str
    deployment_id: str
    run_id: str
    turn: int
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    reason: str | None
    created_at: datetime
    finished_at: datetime | None
    cursor: int
    expires_at: datetime | None = None


def session_record(project: str, environment: str, state: SessionState, run_status: Status | None) -> Session:
    """The session record; its activity is that of its latest run."""
    return Session(
        id=state.id,
        status=state.status,
        activity=activity(run_status) if state.status == "open" else "idle",
        task_id=state.task_id,
        project=project,
        environment=environment,
        external_id=state.external_id,
        workspace_id=state.workspace_id,
        deployment_id=state.deployment_id,
        run_id=state.run_id,
        turn=state.turn,
        tags=state.tags,
        metadata=state.metadata,
        reason=state.reason,
        created_at=state.created_at,
        finished_at=state.finished_at,
        cursor=state.cursor,
        expires_at=state.expires_at,
    )


class Workspace(msgspec.Struct, frozen=True, kw_only=True):
    """A durable file tree; ``state`` is ``live`` while a container of it runs."""

    id: str
    state: Literal["live", "stopped", "deleted"]
    sandbox: str
    project: str
    environment: str
    mount_path: str
    worker: str | None
    host: str | None
    version: str | None
    created_at: datetime
    updated_at: datetime
    cursor: int
    deployment_id: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Any = {}


def workspace_record(project: str, environment: str, state: WorkspaceState) -> Workspace:
    """The workspace record."""
    live = state.materialization
    return Workspace(
        id=state.id,
        state="deleted" if state.status == "deleted" else "live" if live else "stopped",
        sandbox=state.sandbox,
        project=project,
        environment=environment,
        mount_path=state.mount_path,
        worker=live.worker if live else None,
        host=state.host,
        version=state.version,
        created_at=state.created_at,
        updated_at=state.updated_at,
        cursor=state.cursor,
        deployment_id=state.deployment_id or None,
        tags=state.tags,
        metadata=state.metadata,
    )


class QueueHolder(msgspec.Struct, frozen=True, kw_only=True):
    """A run that has a slot of a queue, ``since`` when; ``worker``: who executes it, once somebody does."""

    run_id: str
    concurrency_key: str | None
    status: str
    since: datetime
    worker: str | None


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of one concurrency key (or of none) in a queue."""

    concurrency_key: str | None
    in_use: int
    waiting: int


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as it is now: its limits, the slots in use, and the runs that wait for one.

    The limits are those of the current deployment; ``declared`` is false when it does not know the queue (any more). A list of
    queues leaves ``holders`` and ``keys`` empty.
    """

    name: str
    project: str
    environment: str
    declared: bool
    concurrency: int | None
    concurrency_per_key: int | None
    in_use: int
    waiting: int
    oldest_waiting_at: datetime | None
    keys: list[QueueLoad] = []
    holders: list[QueueHolder] = []


class WorkspaceVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of a workspace were at one time; ``number`` counts its versions from 1."""

    id: str
    number: int
    workspace_id: str
    parent: str | None
    run_id: str | None
    reason: str
    files: int
    bytes: int  #: of all files
    stored: int  #: bytes that were stored for this version alone
    created_at: datetime


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What the store of versions holds that no version needs, and whether it was removed; ``kept`` counts the other blobs."""

    blobs: int
    bytes: int
    kept: int
    removed: bool


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file, folder or symbolic link in a version; bytes of its path that are no UTF-8 are shown as ``\\xff``."""

    path: str
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int
    modified_at: datetime | None
    target: str | None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable snapshot of a task project; ``index`` is what :mod:`helmr.indexing` found in it."""

    id: str
    version: str
    project: str
    environment: str
    content_hash: str  #: sha-256 of the files, packed without compression
    archive: str  #: sha-256 of the archive as it is stored
    archive_bytes: int
    created_at: datetime
    index: dict[str, Any]
    current: bool = False


class StoredSecret(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a secret, which does not include its value."""

    name: str
    project: str
    environment: str
    version: int  #: counts how often it was stored
    key_id: str  #: of the key it is encrypted with
    created_at: datetime
    updated_at: datetime
    updated_by: str | None = None  #: ``user@host``, as the client that stored it put it; nobody checks that


class LogMatch(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a log that was searched for, with the lines around it; ``line`` counts the lines of its chunk from 1."""

    seq: int
    run_id: str
    attempt: int
    stream: str
    at: datetime
    line: int
    text: str
    before: list[str] = []
    after: list[str] = []


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One record of a session stream; ``sequence`` counts the records of the stream from 1 without a gap.

    ``access_id``: the access token it was appended with, if it was.
    """

    id: str
    session_id: str
    stream: str
    direction: Literal["in", "out"]
    sequence: int
    data: Any
    correlation_id: str | None = None
    run_id: str | None = None
    access_id: str | None = None
    at: datetime


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A one-shot completion; ``data`` is what it was completed with."""

    id: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    project: str
    environment: str
    run_id: str | None
    session_id: str | None
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    data: Any
    reason: str | None
    created_at: datetime
    expires_at: datetime
    finished_at: datetime | None
    cursor: int


def token_record(project: str, environment: str, event: TokenEvent) -> Token:
    """The token record, from its latest event."""
    state = event.state
    return Token(
        id=state.id,
        status=state.status,
        project=project,
        environment=environment,
        run_id=state.run_id,
        session_id=state.session_id,
        tags=state.tags,
        metadata=state.metadata,
        data=event.data.get("data") if state.status == "completed" else None,
        reason=state.reason,
        created_at=state.created_at,
        expires_at=state.expires_at,
        finished_at=state.finished_at,
        cursor=state.cursor,
    )


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that was just made, and the secret that completes it over HTTP; None when it was made by an earlier try."""

    token: Token
    secret: str | None


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a start."""

    session: Session
    run: Run
    reused: bool = False


class Exec(msgspec.Struct, frozen=True, kw_only=True):
    """A program run in a workspace beside its runs; ``exit_code`` is as a shell has it: 128 and the signal, if one ended it."""

    id: str
    status: ExecStatus
    workspace_id: str
    project: str
    environment: str
    worker: str
    argv: tuple[str, ...]
    cwd: str | None
    terminal: bool
    kept: bool  #: whether what it writes is stored
    exit_code: int | None
    signal: int | None
    reason: str | None
    stdout: int | None  #: bytes written, once it has ended
    stderr: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cursor: int

    @property
    def ended(self) -> bool:
        """Whether nothing will come of it any more."""
        return self.status not in EXEC_LIVE


def exec_record(project: str, environment: str, state: ExecState) -> Exec:
    """The exec record."""
    code = state.exit_code if state.signal is None else 128 + state.signal
    return Exec(
        id=state.id,
        status=state.status,
        workspace_id=state.workspace_id,
        project=project,
        environment=environment,
        worker=state.worker,
        argv=state.argv,
        cwd=state.cwd,
        terminal=state.terminal,
        kept=state.kept,
        exit_code=code,
        signal=state.signal,
        reason=state.reason,
        stdout=state.stdout,
        stderr=state.stderr,
        created_at=state.created_at,
        started_at=state.started_at,
        finished_at=state.finished_at,
        cursor=state.cursor,
    )


class ExecChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that an exec wrote to ``stdout`` or ``stderr``, from an offset on; ``seq`` orders what is stored of both."""

    seq: int = 0
    stream: str
    offset: int
    data: bytes
