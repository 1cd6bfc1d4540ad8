"""Ends, in an imported history, what nobody will go on with: the log that would tell of it is not the one beside it."""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from datetime import datetime

import duckdb

from store.tables import ATTEMPTS, RUNS, SESSIONS, WAITS, Table

REASON = "it had not ended when it was exported"

#: What a run, a session, an attempt and a wait say once they are ended; the other columns stay as they were.
_RUN = {
    "status": "'cancelled'",
    "cancel_requested": "json_object('reason', $reason, 'force', false)",
    "pending_wait": "NULL",
    "finished_at": "$at",
}
_SESSION = {"status": "'closed'", "reason": "$reason", "finished_at": "$at"}
_ATTEMPT = {
    "run_id": "id",
    "attempt": "open_attempt",
    "worker": "open_worker",
    "leases": "open_leases",
    "started_at": "open_started_at",
    "finished_at": "$at",
    "active_seconds": "active_seconds - open_base",
    "outcome": "'cancelled'",
    "failure_code": "NULL",
    "failure_message": "NULL",
    "seq": "open_seq",
}
_WAIT = {
    "run_id": "id",
    **{name: f"pending_wait->>'{name}'" for name in ("kind", "stream", "token", "correlation_id")},
    "due": "(pending_wait->>'due')::TIMESTAMPTZ",
    "began_at": "(pending_wait->>'since')::TIMESTAMPTZ",
    "ended_at": "$at",
    "outcome": "'cancelled'",
    "seq": "wait_seq",
}


def settle(con: duckdb.DuckDBPyConnection, at: datetime) -> int:
    """End what is open in the history the connection is at, as of ``at``; how many runs that were.

    Runs and tokens are cancelled, sessions closed, workspaces stopped, schedules inactive; no deployment is current.
    """
    given = {"at": at, "reason": REASON}
    con.execute(_ended(ATTEMPTS, _ATTEMPT, "runs_live WHERE open_attempt IS NOT NULL"), {"at": at})
    con.execute(_ended(WAITS, _WAIT, "runs_live WHERE status = 'waiting'"), {"at": at})
    con.execute(_ended(RUNS, _RUN, "runs_live"), given)
    con.execute(_ended(SESSIONS, _SESSION, "sessions_live"), given)
    row = con.execute("SELECT count(*) FROM runs_live").fetchone()
    for table in ("runs_live", "sessions_live", "deployments_current"):
        con.execute(f"DELETE FROM {table}")
    con.execute("UPDATE workspaces SET state = 'stopped', worker = NULL, host = NULL WHERE state <> 'deleted'")
    con.execute("UPDATE schedules SET active = false")
    for table, was, becomes in (("tokens", "pending", "cancelled"), ("access", "active", "revoked")):
        changed = f"status = '{becomes}', reason = $reason, finished_at = $at"
        con.execute(f"UPDATE {table} SET {changed} WHERE status = '{was}'", given)
    return int(row[0]) if row else 0


def _ended(table: Table, values: dict[str, str], source: str) -> str:
    columns = ", ".join(values.get(name, f'"{name}"') for name in table.names)
    return f"INSERT INTO {table.name} SELECT {columns} FROM {source}"
