"""What users are told about the columns that views compute; those of tables stand with them in :mod:`store.tables`."""

from __future__ import annotations

#: Columns that the views of tables add to what is stored.
COMPUTED = {
    ("runs", "queue_seconds"): "from created to first leased",
    ("runs", "duration_seconds"): "from first leased to ended; retries, their delays and waits included",
    ("sessions", "activity"): "status of its latest run while it is open; idle when nothing runs",
    ("deployments", "current"): "whether new sessions start with it",
}

_GROUP = """
    project the project
    environment the environment
    task_id the task
    runs how many runs
"""


def _columns(text: str) -> dict[str, str]:
    return dict(line.split(None, 1) for line in text.strip().splitlines() if line.strip())


#: Columns of the views that answer questions.
ASKED = {
    "run_durations": _columns(
        _GROUP
        + """
        p50_seconds median of duration_seconds
        p95_seconds 95th percentile of duration_seconds
        p99_seconds 99th percentile of duration_seconds
        max_seconds longest duration_seconds
        p50_active_seconds median of active_seconds
        p95_active_seconds 95th percentile of active_seconds
        p50_queue_seconds median of queue_seconds
        p95_queue_seconds 95th percentile of queue_seconds
        p99_queue_seconds 99th percentile of queue_seconds
        wait_seconds sum of wait_seconds
        """
    ),
    "task_health": _columns(
        _GROUP
        + """
        active how many have not ended
        succeeded how many succeeded
        failed how many failed
        cancelled how many were cancelled
        expired how many expired
        success_rate succeeded / (succeeded + failed), from 0 to 1
        retries attempts beyond the first
        p95_queue_seconds 95th percentile of queue_seconds
        p95_seconds 95th percentile of duration_seconds
        last_run_at when the latest was created
        """
    ),
    "hourly_runs": _columns(
        _GROUP
        + """
        hour the hour they were created in
        succeeded how many succeeded
        failed how many failed
        active how many have not ended
        retries attempts beyond the first
        avg_queue_seconds mean of queue_seconds
        p50_seconds median of duration_seconds
        p95_seconds 95th percentile of duration_seconds
        active_seconds sum of active_seconds
        wait_seconds sum of wait_seconds
        """
    ),
    "failures": _columns(
        """
        project the project
        environment the environment
        run_id the run
        task_id the task
        code the code of the failure
        message its message
        pattern the first line of the message without ids and numbers: failures of one kind share it
        attempt the attempt that failed
        exit_code exit code of its process
        finished_at when it ended
        session_id its session
        workspace_id its workspace
        deployment_version version of its deployment
        """
    ),
}
