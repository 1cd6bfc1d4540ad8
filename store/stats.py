"""The questions of ``helmr stats`` as SQL, for anybody who may query: statements with ``$since``, ``$task`` and the like.

They run where users' SQL runs, over a copy of the history, so that no chart ever slows the projector down.
"""

from __future__ import annotations

_ENDED = "finished_at IS NOT NULL"
_RECENT = "created_at >= $since::TIMESTAMPTZ AND ($task::VARCHAR IS NULL OR task_id = $task)"

_COUNTS = f"""
    count(*) AS runs, count(*) FILTER ({_ENDED}) AS ended, count(*) FILTER (status = 'succeeded') AS succeeded,
    count(*) FILTER (status = 'failed') AS failed, count(*) FILTER (status = 'cancelled') AS cancelled,
    count(*) FILTER (status = 'expired') AS expired,
    count(*) FILTER (status = 'succeeded') / nullif(count(*) FILTER (status IN ('succeeded', 'failed')), 0)
      AS success_rate,
    coalesce(sum(coalesce(attempt, 1) - 1), 0)::BIGINT AS retries"""


def _percentiles(name: str) -> str:
    parts = (f"quantile_cont({name}_seconds, {at / 100}) AS {name}_p{at}" for at in (50, 95, 99))
    return ", ".join(parts)


#: ``$since, $task``: one row per task, and one without a task for all of them together, which comes first. Seconds.
TASKS = f"""
    SELECT task_id, {_COUNTS}, {_percentiles("queue")}, {_percentiles("duration")},
      coalesce(sum(wait_seconds), 0) AS wait_seconds, coalesce(sum(active_seconds), 0) AS active_seconds
    FROM runs WHERE {_RECENT}
    GROUP BY GROUPING SETS ((), (task_id)) ORDER BY task_id IS NOT NULL, runs DESC, task_id"""  # noqa: S608

#: ``$since, $task, $width`` (an interval): one row per span of time and task, oldest first; spans without runs are missing.
#: Spans are counted from 1970 on, as clocks do.
SPANS = f"""
    SELECT time_bucket($width::INTERVAL, created_at, TIMESTAMPTZ '1970-01-01 00:00:00+00') AS begins_at, task_id, {_COUNTS},
      quantile_cont(queue_seconds, 0.95) AS queue_p95, quantile_cont(duration_seconds, 0.95) AS duration_p95
    FROM runs WHERE {_RECENT} GROUP BY ALL ORDER BY begins_at, task_id"""  # noqa: S608

#: ``$since, $task, $limit``: failures that differ only in numbers and ids are one; the most frequent first.
FAILURES = """
    SELECT code, pattern, count(*) AS runs, list(DISTINCT task_id ORDER BY task_id) AS tasks,
      min(finished_at) AS first_seen_at, max(finished_at) AS last_seen_at, arg_max(run_id, finished_at) AS example,
      arg_max(message, finished_at) AS message
    FROM failures
    WHERE finished_at >= $since::TIMESTAMPTZ AND ($task::VARCHAR IS NULL OR task_id = $task)
    GROUP BY code, pattern ORDER BY runs DESC, last_seen_at DESC LIMIT $limit"""

#: ``$since, $task, $by, $limit``: the runs that took longest, each beside the median of its task.
SLOW = f"""
    WITH recent AS (
      SELECT id, task_id, status, created_at, coalesce(attempt, 1) AS attempts, queue_seconds, duration_seconds,
        active_seconds, wait_seconds,
        CASE $by WHEN 'queue' THEN queue_seconds WHEN 'active' THEN active_seconds WHEN 'wait' THEN wait_seconds
          ELSE duration_seconds END AS seconds
      FROM runs WHERE {_RECENT} AND {_ENDED}),
    usual AS (SELECT task_id, median(seconds) AS median_seconds FROM recent GROUP BY task_id)
    SELECT r.*, u.median_seconds, r.seconds / nullif(u.median_seconds, 0) AS times_median
    FROM recent r JOIN usual u USING (task_id)
    WHERE r.seconds IS NOT NULL ORDER BY r.seconds DESC, r.id LIMIT $limit"""  # noqa: S608

#: ``$a, $b, $task``: ended runs of two deployment versions, one row per task and version, with how they did.
COMPARE = f"""
    SELECT task_id, deployment_version AS version, {_COUNTS}, {_percentiles("duration")},
      quantile_cont(active_seconds, 0.5) AS active_p50, min(created_at) AS first_run_at
    FROM runs
    WHERE deployment_version IN ($a, $b) AND {_ENDED} AND ($task::VARCHAR IS NULL OR task_id = $task)
    GROUP BY task_id, deployment_version ORDER BY task_id, version"""  # noqa: S608

#: The two deployment versions that ran last, the later one first.
LATEST_VERSIONS = """
    SELECT deployment_version AS version FROM runs GROUP BY version
    ORDER BY split_part(version, '.', 1) DESC, try_cast(split_part(version, '.', 2) AS BIGINT) DESC LIMIT 2"""
