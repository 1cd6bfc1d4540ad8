"""What a run is doing or why it is not, since when, and what would change that: the words for ``helmr run explain``.

This module has the record, and the words for a run that has ended, which need nothing but the run. Those for a live one are in
``bus/explanation.py``: they need to know who has which slot and which workers there are.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from helmr.durations import format_seconds
from helmr.models import Run


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One paragraph (``text``), and the same as facts.

    ``state`` is a finer status: ``held_by_queue, held_by_backlog, queued, no_worker, lost, retrying, woken, preparing, running,
    cancelling, silent, waiting``, or how the run ended. ``facts`` depends on it.
    """

    run_id: str
    status: str
    state: str
    since: datetime
    text: str
    facts: dict[str, Any] = {}


#: What to do about a failure, by its code.
_HINTS: dict[str, str] = {
    "task_error": "`helmr run get {id}` has the traceback, `helmr run logs {id}` what it wrote",
    "task_exit": "`helmr run logs {id}` shows what it wrote last",
    "out_of_memory": "give its sandbox more memory, or let the task use less",
    "max_duration": "start it with a longer --max-duration, or give the task one",
    "worker_lost": 'the task says on_worker_lost="fail"; start it again',
    "dispatch_exhausted": "something of this run ends the workers that take it: see their logs, then start it again",
    "secret_missing": "store the secret with `helmr secret set`, then start it again",
    "image_error": "`helmr run get {id}` has the end of the build's log; correct the image and deploy again",
    "workspace_error": "see the message, and `helmr doctor` on the worker's machine",
    "output_invalid": "let the task return what its return type says, as JSON",
    "output_too_large": "let the task write a file, or return less",
    "disk_full": "free space on the worker's machine, then start it again",
    "nondeterminism": "the task's code takes another way when it is replayed; wrap what differs into a step",
}


def since(now: datetime, at: datetime) -> str:
    """A time and how long ago it was: ``since 12:03:04 UTC (3m 20s)``; with the date unless it is today's."""
    return f"since {clock(now, at)} ({span(now, at)})"


def clock(now: datetime, at: datetime) -> str:
    """A time of day, with the date unless it is today's."""
    at, now = at.astimezone(UTC), now.astimezone(UTC)
    return f"{at:%H:%M:%S} UTC" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def span(now: datetime, at: datetime) -> str:
    """How long ago (or ahead) a time is."""
    return format_seconds(abs((now - at).total_seconds()))


def ended(run: Run, now: datetime) -> Explanation:
    """The words for a run that has ended."""
    at = run.finished_at or run.created_at
    took = f" after running for {format_seconds(run.active_seconds)}" if run.active_seconds else ""
    facts: dict[str, Any] = {"finished_at": at, "active_seconds": run.active_seconds, "attempt": run.attempt}
    match run.status:
        case "failed" if run.failure is not None:
            failure = run.failure
            hint = _HINTS.get(failure.code, "see `helmr run logs {id}`").format(id=run.id)
            again = f" It was attempt {run.attempt}." if (run.attempt or 0) > 1 else ""
            text = f"failed{took}: {failure.code}: {failure.message.rstrip('.')}.{again} What to do: {hint}."
            facts |= {"failure": msgspec.to_builtins(failure), "hint": hint}
        case "cancelled":
            reason = run.cancel_requested.reason if run.cancel_requested else None
            text = f"was cancelled{took}" + (f": {reason}." if reason else ".")
        case "expired":
            text = f"expired: no worker had taken it within its time to live of {format_seconds(run.ttl or 0)}."
        case _:
            text = f"{run.status}{took}."
    return Explanation(
        run_id=run.id,
        status=run.status,
        state=run.status,
        since=at,
        text=f"{run.id} {text} That was at {clock(now, at)} ({span(now, at)} ago); nothing follows.",
        facts=facts,
    )
