"""All tables and views of the history, and every statement that writes them: the one place where SQL is declared.

There are no primary keys and no indexes: in DuckDB 2.0 both make every write a scan of the table. What can still change
lives in small ``…_live`` tables whose touched rows are deleted and inserted again (never updated: an update blocks
checkpoints while anybody reads); what has ended is appended once to ``…_closed``; a view of the plain name unites them.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from typing import NamedTuple

import pyarrow.lib as pa

#: Raised whenever a table changes; files of another version are refused, and rebuilt from the log.
VERSION = 1

#: Row groups of 30,720 rows: the smallest that DuckDB still shreds VARIANT columns in.
HISTORY_ROW_GROUP = 30720
#: Log chunks are some KiB each: with larger row groups every checkpoint rewrites hundreds of megabytes.
LOGS_ROW_GROUP = 10240


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

    def insert(self, source: str) -> str:
        """The statement that appends the staged rows of ``source``."""
        return f"INSERT INTO {self.name} SELECT {', '.join(_cast(column) for column in self.columns)} FROM {source}"


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


def _cast(column: Column, prefix: str = "") -> str:
    name = f'{prefix}"{column.name}"'
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
    deployment_id VARCHAR the deployment it was created under
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
    DEPLOYMENTS,
    CURRENT,
    SCHEDULES,
    UNREADABLE,
    WATERMARKS,
)
LOG_TABLES = (LOGS, WATERMARKS)

_RUN_COLUMNS = ", ".join(f'"{name}"' for name in RUNS.names)
_SECONDS = "date_diff('microseconds', {0}, {1}) / 1e6"

#: Views that unite what is open and what has ended; ``{h}`` is the prefix of the stored tables.
UNIONS: dict[str, str] = {
    "runs": f"""
        SELECT *, {_SECONDS.format("created_at", "started_at")} AS queue_seconds,
          {_SECONDS.format("started_at", "finished_at")} AS duration_seconds
        FROM (SELECT {_RUN_COLUMNS} FROM {{h}}runs_closed UNION ALL SELECT {_RUN_COLUMNS} FROM {{h}}runs_live)""",
    "attempts": """
        SELECT * FROM {h}attempts_closed UNION ALL
        SELECT project, environment, id, task_id, open_attempt, open_worker, open_leases, open_started_at, NULL,
          active_seconds - open_base, NULL, NULL, NULL, open_seq
        FROM {h}runs_live WHERE open_attempt IS NOT NULL""",
    "waits": """
        SELECT * FROM {h}waits_closed UNION ALL
        SELECT project, environment, id, task_id, pending_wait->>'kind', pending_wait->>'stream', pending_wait->>'token',
          pending_wait->>'correlation_id', (pending_wait->>'due')::TIMESTAMPTZ, (pending_wait->>'since')::TIMESTAMPTZ,
          NULL, NULL, wait_seq
        FROM {h}runs_live WHERE status = 'waiting'""",
    "sessions": """
        SELECT s.*, CASE WHEN s.status = 'open' AND r.status IS NOT NULL THEN r.status ELSE 'idle' END AS activity
        FROM (SELECT * FROM {h}sessions_closed UNION ALL SELECT * FROM {h}sessions_live) s
        LEFT JOIN {h}runs_live r ON r.id = s.run_id""",
    "deployments": """
        SELECT d.*, c.deployment_id IS NOT NULL AS current
        FROM {h}deployments_stored d LEFT JOIN {h}deployments_current c
          ON c.project = d.project AND c.environment = d.environment AND c.deployment_id = d.id""",
}

#: Tables users see as they are stored.
PLAIN = ("events", "records", "workspaces", "versions", "schedules")

#: Views that answer the usual questions; they refer to the names users see.
QUESTIONS: dict[str, tuple[str, str]] = {
    "run_durations": (
        "How long runs took, per task: percentiles in seconds",
        """
        SELECT project, environment, task_id, count(*) AS runs,
          quantile_cont(duration_seconds, 0.5) AS p50_seconds, quantile_cont(duration_seconds, 0.95) AS p95_seconds,
          max(duration_seconds) AS max_seconds, quantile_cont(active_seconds, 0.5) AS p50_active_seconds,
          quantile_cont(active_seconds, 0.95) AS p95_active_seconds,
          quantile_cont(queue_seconds, 0.5) AS p50_queue_seconds, quantile_cont(queue_seconds, 0.95) AS p95_queue_seconds,
          sum(wait_seconds) AS wait_seconds
        FROM runs WHERE finished_at IS NOT NULL GROUP BY ALL""",
    ),
    "task_health": (
        "How tasks do: successes, failures, retries, queue wait",
        """
        SELECT project, environment, task_id, count(*) AS runs,
          count(*) FILTER (finished_at IS NULL) AS active,
          count(*) FILTER (status = 'succeeded') AS succeeded, count(*) FILTER (status = 'failed') AS failed,
          count(*) FILTER (status = 'cancelled') AS cancelled, count(*) FILTER (status = 'expired') AS expired,
          count(*) FILTER (status = 'succeeded') / nullif(count(*) FILTER (status IN ('succeeded', 'failed')), 0)
            AS success_rate,
          sum(coalesce(attempt, 1) - 1)::BIGINT AS retries, quantile_cont(queue_seconds, 0.95) AS p95_queue_seconds,
          quantile_cont(duration_seconds, 0.95) AS p95_seconds, max(created_at) AS last_run_at
        FROM runs GROUP BY ALL""",
    ),
    "hourly_runs": (
        "Runs per hour and task",
        """
        SELECT project, environment, date_trunc('hour', created_at) AS hour, task_id, count(*) AS runs,
          count(*) FILTER (status = 'succeeded') AS succeeded, count(*) FILTER (status = 'failed') AS failed,
          count(*) FILTER (finished_at IS NULL) AS active, sum(coalesce(attempt, 1) - 1)::BIGINT AS retries,
          avg(queue_seconds) AS avg_queue_seconds, quantile_cont(duration_seconds, 0.5) AS p50_seconds,
          quantile_cont(duration_seconds, 0.95) AS p95_seconds, sum(active_seconds) AS active_seconds,
          sum(wait_seconds) AS wait_seconds
        FROM runs GROUP BY ALL""",
    ),
    "failures": (
        "Failed runs, with code and message",
        """
        SELECT project, environment, id AS run_id, task_id, failure_code AS code, failure->>'message' AS message, attempt,
          exit_code, finished_at, session_id, workspace_id, deployment_version
        FROM runs WHERE status = 'failed'""",
    ),
}

#: Every name a user's query may read from.
VISIBLE = frozenset({*UNIONS, *PLAIN, *QUESTIONS, "logs"})

_COMMENTS = {
    "runs": RUNS,
    "attempts": ATTEMPTS,
    "waits": WAITS,
    "sessions": SESSIONS,
    "deployments": DEPLOYMENTS,
}


def history_ddl() -> list[str]:
    """The statements that make an empty history file, in the schema that is current."""
    made = [table.ddl() for table in HISTORY_TABLES]
    views = [f"CREATE VIEW {name} AS {body.format(h='')}" for name, body in UNIONS.items()]
    questions = [f"CREATE VIEW {name} AS {body}" for name, (_, body) in QUESTIONS.items()]
    return [*made, _version_ddl(), *views, *questions, *_comments()]


def empty(table: Table) -> str:
    """A SELECT of no rows with the columns of a table."""
    columns = ", ".join(f'NULL::{column.type} AS "{column.name}"' for column in table.columns)
    return f"SELECT {columns} WHERE false"


def logs_ddl() -> list[str]:
    """The statements that make the empty log file of a day."""
    text = LOGS.ddl().replace('"text" VARCHAR', '"text" VARCHAR USING COMPRESSION zstd')
    return [text, WATERMARKS.ddl(), _version_ddl(), *_column_comments("logs", LOGS)]


def _version_ddl() -> str:
    return f"CREATE TABLE schema_version AS SELECT {VERSION} AS version"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _column_comments(name: str, table: Table) -> list[str]:
    return [f'COMMENT ON COLUMN {name}."{column.name}" IS {_quoted(column.comment)}' for column in table.columns]


def _comments() -> list[str]:
    plain = [table for table in HISTORY_TABLES if table.comment]
    tables = [f"COMMENT ON TABLE {table.name} IS {_quoted(table.comment)}" for table in plain]
    views = [f"COMMENT ON VIEW {name} IS {_quoted(table.comment)}" for name, table in _COMMENTS.items()]
    asked = [f"COMMENT ON VIEW {name} IS {_quoted(comment)}" for name, (comment, _) in QUESTIONS.items()]
    columns = [line for table in plain for line in _column_comments(table.name, table)]
    return [*tables, *views, *asked, *columns, *(line for n, t in _COMMENTS.items() for line in _column_comments(n, t))]


def replace_live_runs(source: str) -> list[str]:
    """Put the staged rows of ``source`` in place of those the same runs have in ``runs_live``; ``?`` is the watermark.

    What only the first event tells is taken over from the old row, so that no payload has to be held in memory.
    """
    return [
        f"INSERT INTO runs_live {_carried(RUNS_LIVE, source)} WHERE b.finished_at IS NULL",
        f"INSERT INTO runs_closed {_carried(RUNS, source)} WHERE b.finished_at IS NOT NULL",
        f"DELETE FROM runs_live WHERE last_seq <= ? AND id IN (SELECT id FROM {source})",
    ]


def _carried(table: Table, source: str) -> str:
    columns = [
        f'coalesce({_cast(column, "b.")}, o."{column.name}")'
        if column.name in RUN_SPEC_COLUMNS
        else _cast(column, "b.")
        for column in table.columns
    ]
    return f"SELECT {', '.join(columns)} FROM {source} b LEFT JOIN runs_live o ON o.id = b.id"


def replace_live_sessions(source: str) -> list[str]:
    """Put the staged sessions in place of their old rows; ``?`` is the watermark."""
    columns = ", ".join(_cast(column) for column in SESSIONS.columns)
    return [
        f"INSERT INTO sessions_live SELECT {columns} FROM {source} WHERE finished_at IS NULL",
        f"INSERT INTO sessions_closed SELECT {columns} FROM {source} WHERE finished_at IS NOT NULL",
        f"DELETE FROM sessions_live WHERE last_seq <= ? AND id IN (SELECT id FROM {source})",
    ]


def replace_by_id(table: Table, source: str, key: str = "id") -> list[str]:
    """Put the staged rows in place of the rows of the same id."""
    return [f"DELETE FROM {table.name} WHERE {key} IN (SELECT {key} FROM {source})", table.insert(source)]


REPLACE_CURRENT = [
    "DELETE FROM deployments_current WHERE (project, environment) IN (SELECT (project, environment) FROM {source})",
    CURRENT.insert("{source}"),
]

#: What a restart needs to go on counting, for each unfinished run.
LOAD_LIVE = """
    SELECT id, first_seq, waits, wait_seconds, open_attempt,
      strftime(open_started_at AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%fZ') AS open_started_at,
      open_worker, open_leases, open_base, open_seq, wait_seq,
      CASE WHEN status = 'waiting' THEN pending_wait END AS pending_wait
    FROM runs_live"""
