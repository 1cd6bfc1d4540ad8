"""Ends, in an imported history, what nobody will go on with: the log that would tell of it is not the one beside it."""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

from datetime import datetime

import duckdb

from store.tables import RUNS

REASON = "it had not ended when it was exported"

#: What runs and sessions say once they are ended; the other columns stay as they were.
_RUN = """
    'cancelled' AS status, json_object('reason', $reason, 'force', false) AS cancel_requested, NULL AS pending_wait,
    $at AS finished_at"""
_SESSION = "'closed' AS status, $reason AS reason, $at AS finished_at"

_RUN_COLUMNS = ", ".join(f'"{name}"' for name in RUNS.names)
#: Ends what is open: attempts and waits are, as long as their run is; the views of both tell them.
_END = (
    """INSERT INTO attempts_closed
       SELECT * REPLACE ($at AS finished_at, 'cancelled' AS outcome) FROM attempts WHERE finished_at IS NULL""",
    "INSERT INTO waits_closed SELECT * REPLACE ($at AS ended_at, 'cancelled' AS outcome) FROM waits WHERE ended_at IS NULL",
    f"INSERT INTO runs_closed SELECT * REPLACE ({_RUN}) FROM (SELECT {_RUN_COLUMNS} FROM runs_live)",
    f"INSERT INTO sessions_closed SELECT * REPLACE ({_SESSION}) FROM sessions_live",
)


def settle(con: duckdb.DuckDBPyConnection, at: datetime) -> int:
    """End what is open in the history the connection is at, as of ``at``; how many runs that were.

    Runs and tokens are cancelled, sessions closed, workspaces stopped, schedules inactive; no deployment is current.
    """
    given = {"at": at, "reason": REASON}
    for statement in _END:
        con.execute(statement, {name: value for name, value in given.items() if f"${name}" in statement})
    ((ended,),) = con.execute("SELECT count(*) FROM runs_live").fetchall()
    for table in ("runs_live", "sessions_live", "deployments_current"):
        con.execute(f"DELETE FROM {table}")
    con.execute("UPDATE workspaces SET state = 'stopped', worker = NULL, host = NULL WHERE state <> 'deleted'")
    con.execute("UPDATE schedules SET active = false")
    for table, was, becomes in (("tokens", "pending", "cancelled"), ("access", "active", "revoked")):
        changed = f"status = '{becomes}', reason = $reason, finished_at = $at"
        con.execute(f"UPDATE {table} SET {changed} WHERE status = '{was}'", given)
    return int(ended)
