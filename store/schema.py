"""The views over the tables, and every statement that makes or writes tables: the one place where SQL is declared.

There are no primary keys and no indexes: in DuckDB 2.0 both make every write a scan of the table. What can still change
lives in small ``…_live`` tables whose touched rows are deleted and inserted again (never updated: an update blocks
checkpoints while anybody reads); what has ended is appended once to ``…_closed``; a view of the plain name unites them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import duckdb

from store.meanings import ASKED, COMPUTED
from store.tables import HISTORY_TABLES, LOGS, RUN_SPEC_COLUMNS, RUNS, VERSION, WATERMARKS, Column, Table

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted


def _as_staged(column: Column) -> str:
    """A stored column as :meth:`Table.staging` has it."""
    return f'"{column.name}"::VARCHAR AS "{column.name}"' if column.type in {"JSON", "TIMESTAMPTZ"} else column.name


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
PLAIN = ("events", "records", "workspaces", "versions", "tokens", "access", "schedules")

#: A failure's message as the kind of failure it is: its first line, with ids, addresses and numbers left out.
_PATTERN = r"""
    left(regexp_replace(regexp_replace(regexp_replace(regexp_replace(regexp_replace(regexp_replace(failure->>'message',
      '\n(.|\n)*', ''),
      '\b(run|ses|ws|dep|tok|exec|pty|sch|ver|wrk)_[0-9a-z]+\b', '<id>', 'g'),
      '\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}\b', '<uuid>', 'g'),
      '\b\d+\.\d+', '<n>', 'g'),
      '\b(0x[0-9a-fA-F]+|[0-9a-f]{12,})\b', '<hex>', 'g'),
      '\d+', '<n>', 'g'), 200)"""

#: Views that answer the usual questions; they refer to the names users see.
QUESTIONS: dict[str, tuple[str, str]] = {
    "run_durations": (
        "How long runs took, per task: percentiles in seconds",
        """
        SELECT project, environment, task_id, count(*) AS runs,
          quantile_cont(duration_seconds, 0.5) AS p50_seconds, quantile_cont(duration_seconds, 0.95) AS p95_seconds,
          quantile_cont(duration_seconds, 0.99) AS p99_seconds, max(duration_seconds) AS max_seconds,
          quantile_cont(active_seconds, 0.5) AS p50_active_seconds,
          quantile_cont(active_seconds, 0.95) AS p95_active_seconds,
          quantile_cont(queue_seconds, 0.5) AS p50_queue_seconds, quantile_cont(queue_seconds, 0.95) AS p95_queue_seconds,
          quantile_cont(queue_seconds, 0.99) AS p99_queue_seconds, sum(wait_seconds) AS wait_seconds
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
        f"""
        SELECT project, environment, id AS run_id, task_id, failure_code AS code, failure->>'message' AS message,
          {_PATTERN} AS pattern, attempt, exit_code, finished_at, session_id, workspace_id, deployment_version
        FROM runs WHERE status = 'failed'""",
    ),
}

#: Every name a user's query may read from.
VISIBLE = frozenset({*UNIONS, *PLAIN, *QUESTIONS, "logs"})

#: The stored tables, by the names users know them by.
STORED = {table.name.removesuffix("_closed").removesuffix("_stored"): table for table in (*HISTORY_TABLES, LOGS)}


def meanings(name: str) -> dict[str, str]:
    """What users are told about the columns of a table or view that they can read."""
    if name in ASKED:
        return ASKED[name]
    stored = {column.name: column.comment for column in STORED[name].columns}
    return stored | {column: comment for (view, column), comment in COMPUTED.items() if view == name}


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


class Archived(NamedTuple):
    """A file of the archive: a day of events, and the positions in the log it covers."""

    day: str
    first_seq: int
    last_seq: int
    file: str


def archived(cursor: duckdb.DuckDBPyConnection, prefix: str = "") -> list[Archived]:
    """The archived events a history knows of, oldest first; ``prefix`` names its database."""
    found = cursor.execute(f"SELECT day, first_seq, last_seq, file FROM {prefix}archived ORDER BY first_seq").fetchall()
    return [Archived(*row) for row in found]


def plain(table: Table) -> str:
    """The columns of a table in types that every reader of Parquet knows: JSON and VARIANT as text."""
    return ", ".join(
        f'"{c.name}"::JSON::VARCHAR AS "{c.name}"' if c.type in {"VARIANT", "JSON"} else f'"{c.name}"'
        for c in table.columns
    )


def cold(table: Table, paths: Iterable[Path | str]) -> str:
    """A SELECT of what :func:`plain` wrote into Parquet files, in the types of the table."""
    columns = (f'{_typed(column)} AS "{column.name}"' for column in table.columns)
    files = ", ".join(_quoted(str(path)) for path in paths)
    return f"SELECT {', '.join(columns)} FROM read_parquet([{files}])"


def _typed(column: Column) -> str:
    text = '"{0}"::JSON::{1}' if column.type == "VARIANT" else '"{0}"::{1}'
    return text.format(column.name, column.type)


def logs_ddl() -> list[str]:
    """The statements that make the empty log file of a day."""
    text = LOGS.ddl().replace('"text" VARCHAR', '"text" VARCHAR USING COMPRESSION zstd')
    return [text, WATERMARKS.ddl(), _version_ddl(), *_column_comments("logs", LOGS)]


def _version_ddl() -> str:
    return f"CREATE TABLE schema_version AS SELECT {VERSION} AS version"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _column_comments(name: str, table: Table) -> list[str]:
    return [_column_comment(name, column.name, column.comment) for column in table.columns]


def _column_comment(name: str, column: str, comment: str) -> str:
    return f'COMMENT ON COLUMN {name}."{column}" IS {_quoted(comment)}'


def _comments() -> list[str]:
    plain, united = [table for table in HISTORY_TABLES if table.comment], {name: STORED[name] for name in UNIONS}
    tables = [f"COMMENT ON TABLE {table.name} IS {_quoted(table.comment)}" for table in plain]
    views = [f"COMMENT ON VIEW {name} IS {_quoted(table.comment)}" for name, table in united.items()]
    asked = [f"COMMENT ON VIEW {name} IS {_quoted(comment)}" for name, (comment, _) in QUESTIONS.items()]
    columns = [line for table in plain for line in _column_comments(table.name, table)]
    columns += [line for name, table in united.items() for line in _column_comments(name, table)]
    computed = [_column_comment(*where, comment) for where, comment in COMPUTED.items()]
    answers = [_column_comment(name, *column) for name, columns in ASKED.items() for column in columns.items()]
    return [*tables, *views, *asked, *columns, *computed, *answers]


#: The tables whose rows are replaced when what they are about changes, and what names such a row.
REPLACED = {
    "runs_live": "id",
    "sessions_live": "id",
    "workspaces": "id",
    "tokens": "id",
    "access": "id",
    "deployments_stored": "id",
    "deployments_current": "project || '.' || environment",
}

#: What a run's next row takes over from the one it replaces, so that no payload has to be held in memory.
CARRIED = {"runs_live": ", ".join(["id", *(_as_staged(c) for c in RUNS.columns if c.name in RUN_SPEC_COLUMNS)])}

#: Deletes every watermark that a larger one of the same stream has taken the place of.
FORGET_MARKS = "DELETE FROM projection p WHERE seq < (SELECT max(seq) FROM projection q WHERE q.stream = p.stream)"

#: How far each stream has been applied, and when it was created.
LOAD_MARKS = "SELECT stream, max(seq), arg_max(stream_created, seq) FROM projection GROUP BY stream"

#: What a restart needs to go on counting, for each unfinished run.
LOAD_LIVE = """
    SELECT id, first_seq, waits, wait_seconds, open_attempt,
      strftime(open_started_at AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%fZ') AS open_started_at,
      open_worker, open_leases, open_base, open_seq, wait_seq,
      CASE WHEN status = 'waiting' THEN pending_wait END AS pending_wait
    FROM runs_live"""
