"""The tables of the history, column by column, with what users are told about each."""

# every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from typing import NamedTuple

import pyarrow.lib as pa

#: Raised whenever the columns of a table change: files of an earlier version are carried over, those of a later one refused.
VERSION = 3

#: Row groups of 30,720 rows: the smallest that DuckDB still shreds VARIANT columns in.
HISTORY_ROW_GROUP = 30720
#: The smallest there is: log chunks are up to 64 KiB each, and every checkpoint rewrites the last row group. With 10,240 rows,
#: chunks of 16 KiB took 125 us instead of 80, and the longest checkpoint 0.5 s instead of 0.2.
LOGS_ROW_GROUP = 2048


class Column(NamedTuple):
    """A column: its SQL type as declared, and what users are told about it."""

    name: str
    type: str
    comment: str


class Table(NamedTuple):
    """A table as stored: name, columns in order, and what users are told about it."""

    name: str
    columns: tuple[Column, ...]
    comment: str = ""

    @property
    def names(self) -> list[str]:
        """The names of the columns, in order."""
        return [column.name for column in self.columns]

    def named(self, name: str, *more: Column) -> Table:
        """The same columns, and ``more``, under another name."""
        return Table(name, self.columns + more, self.comment)

    def ddl(self) -> str:
        """The CREATE TABLE statement."""
        columns = ", ".join(f'"{column.name}" {column.type}' for column in self.columns)
        return f"CREATE TABLE {self.name} ({columns})"

    def staging(self) -> pa.Schema:
        """How rows travel to DuckDB: times, JSON and VARIANT as text, which the insert casts outside the GIL."""
        return pa.schema([(column.name, _STAGED.get(_plain(column.type), pa.string())) for column in self.columns])


_STAGED = {
    "BIGINT": pa.int64(),
    "INTEGER": pa.int32(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR[]": pa.list_(pa.string()),
    "BLOB": pa.binary(),
}


def _plain(declared: str) -> str:
    return declared.partition(" ")[0]


def cast(column: Column) -> str:
    """The expression that turns a staged column into what the table holds."""
    name = f'"{column.name}"'
    if column.type == "VARIANT":
        return f"{name}::JSON::VARIANT"
    return f"{name}::{column.type}" if column.type in {"JSON", "TIMESTAMPTZ"} else name


def _table(name: str, comment: str, columns: str) -> Table:
    rows = (line.split(None, 2) for line in columns.strip().splitlines())
    return Table(name, tuple(Column(*row) for row in rows), comment)


RUNS = _table(
    "runs_closed",
    "Runs, one row each, as helmr run get shows them; payload->>'key' and payload.key both read a field of a JSON column",
    """
    id VARCHAR the id of the run
    status VARCHAR queued, running, waiting, succeeded, failed, cancelled or expired
    task_id VARCHAR the task it executes
    project VARCHAR the project
    environment VARCHAR the environment
    session_id VARCHAR the session it belongs to
    turn INTEGER which run of its session it is, from 0
    workspace_id VARCHAR the workspace it executes on
    deployment_id VARCHAR the deployment it is pinned to
    deployment_version VARCHAR that deployment's version
    payload JSON what it was started with
    output JSON what it returned, once succeeded
    output_artifact JSON where a large output is stored instead
    failure JSON code, message and detail, once failed
    failure_code VARCHAR the code of the failure
    metadata JSON what the task made known about itself
    tags VARCHAR[] tags given at the start
    secrets VARCHAR[] names of the secrets it declared
    max_duration DOUBLE seconds it may spend in running
    attempt INTEGER the task-level try, from 1; null until first leased
    dispatch_attempt INTEGER the delivery-level try of the attempt
    queue VARCHAR the queue, if any
    priority INTEGER priority in its lane
    concurrency_key VARCHAR the concurrency key, if any
    ttl DOUBLE seconds it was allowed to stay queued before its first lease
    external_id VARCHAR the external id of its start
    cancel_requested JSON reason and force of a cancellation under way
    pending_wait JSON what it is waiting for
    exit_code INTEGER exit code of its process
    created_at TIMESTAMPTZ when it was started
    started_at TIMESTAMPTZ when it was first leased
    finished_at TIMESTAMPTZ when it ended
    active_seconds DOUBLE seconds spent in running, all attempts together
    wait_seconds DOUBLE seconds spent in completed waits
    waits INTEGER how many waits it made
    log_bytes BIGINT bytes of log it left, once ended
    logs_truncated BOOLEAN whether its log was cut off at the limit
    cursor BIGINT how many events it has
    first_seq BIGINT sequence of its first event; events.seq of the run is never smaller
    last_seq BIGINT sequence of its latest event
    first_stored_at TIMESTAMPTZ when the log stored its first event
    last_stored_at TIMESTAMPTZ when the log stored its latest event
    """,
)

#: Columns known from the first event of a run alone: a later batch takes them over from the row it replaces.
RUN_SPEC_COLUMNS = frozenset(
    {"deployment_version", "payload", "tags", "secrets", "ttl", "external_id", "first_seq", "first_stored_at"}
)

#: What only an unfinished run needs: its open attempt and wait, so that a restart can go on counting.
_OPEN = _table(
    "",
    "",
    """
    open_attempt INTEGER the attempt under way
    open_started_at TIMESTAMPTZ when it was first leased
    open_worker VARCHAR the worker that leased it last
    open_leases INTEGER how often it was leased
    open_base DOUBLE active seconds of earlier attempts
    open_seq BIGINT sequence of its first lease
    wait_seq BIGINT sequence of the event that began the pending wait
    """,
)
RUNS_LIVE = RUNS.named("runs_live", *_OPEN.columns)

ATTEMPTS = _table(
    "attempts_closed",
    "Attempts: one row per task-level try of a run",
    """
    project VARCHAR the project
    environment VARCHAR the environment
    run_id VARCHAR the run
    task_id VARCHAR its task
    attempt INTEGER number of the attempt, from 1
    worker VARCHAR the worker that leased it last
    leases INTEGER how often it was leased: redeliveries and resumptions after waits count
    started_at TIMESTAMPTZ when it was first leased
    finished_at TIMESTAMPTZ when it ended; null while under way
    active_seconds DOUBLE seconds spent in running
    outcome VARCHAR succeeded, failed, cancelled, expired; null while under way
    failure_code VARCHAR the code of its failure
    failure_message VARCHAR the message of its failure
    seq BIGINT sequence of its first lease
    """,
)

WAITS = _table(
    "waits_closed",
    "Waits: pauses of a run for stream input, a token or a timer",
    """
    project VARCHAR the project
    environment VARCHAR the environment
    run_id VARCHAR the run
    task_id VARCHAR its task
    kind VARCHAR stream, token or timer
    stream VARCHAR the input stream it waits on
    token VARCHAR the token it waits for
    correlation_id VARCHAR which records match
    due TIMESTAMPTZ when it times out or the timer fires
    began_at TIMESTAMPTZ when it began
    ended_at TIMESTAMPTZ when it ended; null while pending
    outcome VARCHAR completed, timed_out, cancelled, or how the run ended; null while pending
    seq BIGINT sequence of the event that began it
    """,
)

EVENTS = _table(
    "events",
    "Everything that happened to runs, in the order it was stored",
    """
    seq BIGINT position in the log
    project VARCHAR the project
    environment VARCHAR the environment
    run_id VARCHAR the run
    cursor BIGINT position within the run, from 1 without a gap
    id VARCHAR the id of the event
    kind VARCHAR queued, leased, started, waiting, step, output, succeeded, failed …
    at TIMESTAMPTZ when it happened
    attempt INTEGER the attempt it belongs to
    dispatch_attempt INTEGER the delivery-level try
    source VARCHAR control, worker or task
    message VARCHAR one line for people
    worker VARCHAR the worker named in the event
    name VARCHAR name of the step, stream or token
    reason VARCHAR cause or reason given
    code VARCHAR failure code
    data VARIANT the details; data.key::VARCHAR reads a field
    """,
)

SESSIONS = _table(
    "sessions_closed",
    "Sessions: one conversation or job each, made of runs",
    """
    id VARCHAR the id of the session
    status VARCHAR open, closed, cancelled or expired
    task_id VARCHAR the task of its runs
    project VARCHAR the project
    environment VARCHAR the environment
    external_id VARCHAR the name its starter gave it
    workspace_id VARCHAR its workspace
    deployment_id VARCHAR the deployment it is pinned to
    run_id VARCHAR its latest run
    turn INTEGER the latest turn, from 0
    tags VARCHAR[] tags
    metadata JSON metadata given at the start
    reason VARCHAR why it ended
    created_at TIMESTAMPTZ when it was opened
    expires_at TIMESTAMPTZ when it ends by itself
    finished_at TIMESTAMPTZ when it ended
    cursor BIGINT how many events it has
    last_seq BIGINT sequence of its latest event
    """,
)
SESSIONS_LIVE = SESSIONS.named("sessions_live")

RECORDS = _table(
    "records",
    "Records of session streams",
    """
    seq BIGINT position in the log of stream records
    project VARCHAR the project
    environment VARCHAR the environment
    session_id VARCHAR the session
    direction VARCHAR in or out
    stream VARCHAR the stream
    sequence BIGINT position within the stream, from 1
    id VARCHAR the id of the record
    correlation_id VARCHAR the correlation id
    run_id VARCHAR the run that wrote it
    access_id VARCHAR the access token it was appended with
    at TIMESTAMPTZ when it was written
    data JSON the record itself
    """,
)

WORKSPACES = _table(
    "workspaces",
    "Workspaces: durable file trees",
    """
    id VARCHAR the id of the workspace
    state VARCHAR live while a container of it runs, else stopped; or deleted
    sandbox VARCHAR the sandbox it was made from
    project VARCHAR the project
    environment VARCHAR the environment
    mount_path VARCHAR where its files appear in the container
    worker VARCHAR the worker it is live on
    host VARCHAR the host that has its files
    version VARCHAR its latest version
    deployment_id VARCHAR the deployment whose sandbox it has
    tags VARCHAR[] tags
    metadata JSON metadata
    created_at TIMESTAMPTZ when it was created
    updated_at TIMESTAMPTZ when it last changed
    cursor BIGINT how many events it has
    last_seq BIGINT sequence of its latest event
    """,
)

VERSIONS = _table(
    "versions",
    "Versions of workspaces: what their files were at the end of a run",
    """
    project VARCHAR the project
    environment VARCHAR the environment
    workspace_id VARCHAR the workspace
    id VARCHAR the id of the version
    run_id VARCHAR the run that left it
    files BIGINT how many files
    bytes BIGINT bytes of all files
    created_at TIMESTAMPTZ when it was made
    seq BIGINT position in the log
    """,
)

TOKENS = _table(
    "tokens",
    "Tokens: one-shot completions by somebody outside",
    """
    id VARCHAR the id of the token
    status VARCHAR pending, completed, cancelled or expired
    project VARCHAR the project
    environment VARCHAR the environment
    run_id VARCHAR the run that made it
    session_id VARCHAR that run's session
    tags VARCHAR[] tags
    metadata JSON metadata given when it was made
    data JSON what it was completed with
    reason VARCHAR why it was cancelled
    created_at TIMESTAMPTZ when it was made
    expires_at TIMESTAMPTZ until when it can be completed
    finished_at TIMESTAMPTZ when it ended
    cursor BIGINT how many events it has
    last_seq BIGINT sequence of its latest event
    """,
)

ACCESS = _table(
    "access",
    "Access tokens: who could do what over HTTP, and until when",
    """
    id VARCHAR the id of the access token
    status VARCHAR active, used_up, revoked or expired
    project VARCHAR the project
    environment VARCHAR the environment
    action VARCHAR append, read or complete
    session_id VARCHAR the session of the stream
    stream VARCHAR the stream that can be appended to or read
    token_id VARCHAR the token that can be completed
    correlation_id VARCHAR the correlation id it is confined to
    uses INTEGER how often it can be used; null: any number of times
    used INTEGER how often it was, where that is counted
    note VARCHAR what it is for
    reason VARCHAR why it was revoked
    created_at TIMESTAMPTZ when it was made
    expires_at TIMESTAMPTZ until when it can be used
    finished_at TIMESTAMPTZ when it ended
    cursor BIGINT how many events it has
    last_seq BIGINT sequence of its latest event
    """,
)

DEPLOYMENTS = _table(
    "deployments_stored",
    "Deployments: immutable snapshots of a task project",
    """
    id VARCHAR the id of the deployment
    version VARCHAR its version, YYYYMMDD.N
    project VARCHAR the project
    environment VARCHAR the environment
    content_hash VARCHAR sha-256 of its files
    archive VARCHAR sha-256 of its archive
    archive_bytes BIGINT bytes of its archive
    created_at TIMESTAMPTZ when it was made
    index JSON its tasks, sandboxes, queues and streams
    seq BIGINT position in the configuration log
    """,
)
CURRENT = _table(
    "deployments_current",
    "The current deployment of each environment",
    """
    project VARCHAR the project
    environment VARCHAR the environment
    deployment_id VARCHAR the deployment new sessions start with
    seq BIGINT position in the configuration log
    """,
)

SCHEDULES = _table(
    "schedules",
    "Schedules: starts of a task by the clock",
    """
    id VARCHAR the id of the schedule
    project VARCHAR the project
    environment VARCHAR the environment
    task_id VARCHAR the task it starts
    cron VARCHAR when, as a cron expression
    timezone VARCHAR the time zone of the expression
    payload JSON what it starts the task with
    active BOOLEAN whether it fires
    created_at TIMESTAMPTZ when it was created
    updated_at TIMESTAMPTZ when it last changed
    seq BIGINT position in the log
    """,
)

UNREADABLE = _table(
    "unreadable",
    "Messages of the log that could not be understood and were passed over",
    """
    stream VARCHAR the log stream
    seq BIGINT position in it
    subject VARCHAR the subject
    reason VARCHAR what was wrong
    """,
)

LOGS = _table(
    "logs",
    "What runs wrote, in chunks",
    """
    seq BIGINT position in the log of chunks
    project VARCHAR the project
    environment VARCHAR the environment
    run_id VARCHAR the run
    attempt INTEGER the attempt
    dispatch_attempt INTEGER the delivery-level try
    stream VARCHAR stdout, stderr or log
    byte_offset BIGINT position of the chunk in that stream of that dispatch
    at TIMESTAMPTZ when it was written
    stored_at TIMESTAMPTZ when the log stored it
    bytes INTEGER length of the chunk in bytes
    tombstone VARCHAR why bytes are missing from here on
    text VARCHAR the chunk as text
    raw BLOB the bytes themselves, only where they are not valid UTF-8
    """,
)

WATERMARKS = _table(
    "projection",
    "How far each log stream has been applied",
    """
    stream VARCHAR the log stream
    seq BIGINT the last sequence applied
    applied_at TIMESTAMPTZ when
    stream_created VARCHAR when the stream was created: another stream of the same name is refused
    """,
)

ARCHIVED = _table(
    "archived",
    "Events that are in files of the archive instead of the table",
    """
    day VARCHAR the day they are of, YYYYMMDD
    first_seq BIGINT position in the log from which on the file has all there were
    last_seq BIGINT position in the log up to which it has
    file VARCHAR name of the file below archive/
    """,
)

FORGOTTEN = _table(
    "forgotten",
    "What the history has let go because it was kept long enough",
    """
    project VARCHAR the project
    environment VARCHAR the environment
    kind VARCHAR events or logs
    before TIMESTAMPTZ those of earlier days are gone
    """,
)

HISTORY_TABLES = (
    RUNS,
    RUNS_LIVE,
    ATTEMPTS,
    WAITS,
    EVENTS,
    SESSIONS,
    SESSIONS_LIVE,
    RECORDS,
    WORKSPACES,
    VERSIONS,
    TOKENS,
    ACCESS,
    DEPLOYMENTS,
    CURRENT,
    SCHEDULES,
    UNREADABLE,
    WATERMARKS,
    ARCHIVED,
    FORGOTTEN,
)
