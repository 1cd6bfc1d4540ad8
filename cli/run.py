"""``helmr run``: list, get, explain, logs, events, wait, cancel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from cli.follow import LogPrinter, conclude, fail_unless_succeeded, goes_on, still_running
from cli.options import DURATION, Choice, Group, ask, flags, interrupted
from cli.output import age, compact, json_line, json_value, line, moment, note, record, span, table, to_json, working
from cli.references import RUN, SESSION, TASK
from cli.timings import Timing, timings
from helmr.errors import TimedOut
from helmr.events import Wait
from helmr.models import Event, Run
from helmr.reducers.run import describe

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

_STATUSES = ["queued", "running", "waiting", "succeeded", "failed", "cancelled", "expired"]
#: Events asked for at a time.
_PAGE = 500


@click.group(cls=Group)
def run() -> None:
    """List, show, follow, wait for and cancel runs."""


@run.command("list")
@click.option("--status", type=Choice(_STATUSES), help="Only runs in this status.")
@click.option("--task", type=TASK, help="Only runs of this task.")
@click.option("--session", type=SESSION, help="Only runs of this session.")
@click.option("--since", type=DURATION, metavar="D", help="Only those created in this time, e.g. 2h.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(status: str | None, task: str | None, session: str | None, since: float | None, limit: int) -> None:
    """List runs, newest first."""

    found = ask(lambda client: client.runs.list(status=status, task=task, session=session, since=since, limit=limit))
    if flags().json:
        json_value(found)
        return
    rows = [_row(each) for each in found]
    table(("RUN", "TASK", "STATUS", "ATTEMPT", "CREATED", "TOOK", "FAILURE", "WAITS FOR"), rows)


def _row(shown: Run) -> tuple[object, ...]:
    took = span(shown.started_at, shown.finished_at)
    why = shown.failure.code if shown.failure else None
    wait = describe(shown.pending_wait) if shown.pending_wait else None
    return shown.id, shown.task_id, shown.status, shown.attempt, age(shown.created_at), took, why, wait


def _wait(wait: Wait) -> str:
    """What a run waits for, since when, and until when at most."""
    until = f", until {wait.due:%Y-%m-%d %H:%M:%S} UTC" if wait.due and wait.kind != "timer" else ""
    return f"{describe(wait)}, since {moment(wait.since)}{until}"


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--timings", "timed", is_flag=True, help="Show where its time went instead, stage by stage.")
def get(run_id: str, *, timed: bool) -> None:
    """Show a run.

    Examples:

    \b
      helmr run get @last
      helmr run get @last --timings
    """
    if timed:
        _show_timings(ask(lambda client: _timings(client, run_id)))
    else:
        _show(ask(lambda client: client.runs.get(run_id)))


async def _timings(client: AsyncClient, run_id: str) -> list[Timing]:
    resolved = await client.resolve("run", run_id)
    return timings([event async for event in _stored_events(client, resolved, 0)])


def _show_timings(found: list[Timing]) -> None:
    if flags().json:
        json_value(found)
        return
    rows = [(each.stage, f"{each.at * 1000:.1f}", f"{each.seconds * 1000:.1f}", each.attempt) for each in found]
    table(("STAGE", "AT MS", "TOOK MS", "ATTEMPT"), rows)


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
def explain(run_id: str) -> None:
    """Say what a run is doing or why it is not, since when, and what would change that.

    In one paragraph; with --json also as facts: who holds the slots of its queue, how many runs come before it, which
    workers could take it, what it waits for and until when.
    """
    told = ask(lambda client: client.runs.explain(run_id))
    if flags().json:
        json_value(told)
    else:
        line(told.text)


def _show(shown: Run) -> None:
    if flags().json:
        json_value(shown)
        return
    cancel, wait = shown.cancel_requested, shown.pending_wait
    record(
        {
            "id": shown.id,
            "status": shown.status,
            "task": shown.task_id,
            "scope": f"{shown.project}/{shown.environment}",
            "deployment": f"{shown.deployment_version} ({shown.deployment_id})",
            "session": f"{shown.session_id} (turn {shown.turn})",
            "workspace": shown.workspace_id,
            "attempt": shown.attempt,
            "dispatch": shown.dispatch_attempt or None,
            "queue": shown.queue,
            "concurrency": shown.concurrency_key,
            "priority": shown.priority or None,
            "tags": ", ".join(shown.tags) or None,
            "secrets": ", ".join(shown.secrets) or None,
            "created": moment(shown.created_at),
            "started": moment(shown.started_at),
            "finished": moment(shown.finished_at),
            "took": span(shown.started_at, shown.finished_at) or None,
            "waits for": _wait(wait) if wait else None,
            "cancel": (cancel.reason or "requested") if cancel else None,
            "payload": compact(shown.payload),
            "metadata": compact(shown.metadata),
            "output": to_json(shown.output, indent=True) if shown.status == "succeeded" else None,
            "exit code": shown.exit_code,
            "failure": _failure(shown),
        }
    )


def _failure(shown: Run) -> str | None:
    failure = shown.failure
    if failure is None:
        return None
    told = [f"{failure.code}: {failure.message}" + (" (retryable)" if failure.retryable else "")]
    for name, value in failure.detail.items():
        text = str(value).rstrip() if isinstance(value, str) else to_json(value)
        told.append(text if name == "traceback" else f"{name}: {text}")
    return "\n".join(told)


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--follow", is_flag=True, help="Go on until the run ends.")
@click.option(
    "--stream", type=Choice(["stdout", "stderr", "log"]), help="Only this one; log prints its JSON lines on stdout."
)
@click.option("--attempt", type=click.IntRange(1), help="Only this attempt.")
def logs(run_id: str, follow: bool, stream: str | None, attempt: int | None) -> None:
    """Print what a run has written: stdout to stdout, stderr and logger lines to stderr."""
    printer = LogPrinter(as_json=flags().json, raw=stream == "log")

    async def read(client: AsyncClient) -> None:
        async for chunk in client.runs.logs(run_id, follow=follow, stream=stream, attempt=attempt):
            printer.take(chunk)
        printer.end()

    with interrupted(goes_on(run_id) if follow else None):
        ask(read)


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--follow", is_flag=True, help="Go on until the terminal event.")
@click.option("--cursor", type=click.IntRange(0), default=0, help="Only events after this cursor.")
@click.option("--limit", type=click.IntRange(1), help="No more than this many.")
def events(run_id: str, follow: bool, cursor: int, limit: int | None) -> None:
    """Print a run's events as JSON lines."""

    ask(lambda client: _print_events(client, run_id, cursor, limit, follow=follow))


async def _print_events(client: AsyncClient, run_id: str, after: int, limit: int | None, *, follow: bool) -> None:
    resolved = await client.resolve("run", run_id)
    found = client.runs.events.subscribe(resolved, after=after) if follow else _stored_events(client, resolved, after)
    left = -1 if limit is None else limit
    async for event in found:
        json_line(event)
        left -= 1
        if left == 0:
            return


async def _stored_events(client: AsyncClient, run_id: str, after: int) -> AsyncIterator[Event]:
    while page := await client.runs.events.list(run_id, after=after, limit=_PAGE):
        for event in page:
            yield event
        after = page[-1].cursor


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--timeout", type=DURATION, metavar="D", help="Wait no longer than this; exit code 7.")
def wait(run_id: str, timeout: float | None) -> None:
    """Wait for a run's end; prints its output. The exit code is 3 when it ended other than succeeded."""

    async def await_end(client: AsyncClient) -> Run:
        resolved = await client.resolve("run", run_id)
        try:
            return await client.runs.wait(resolved, timeout=timeout)
        except TimedOut:
            raise still_running(resolved, timeout) from None

    with interrupted(goes_on(run_id)), working(f"waiting for {run_id}"):
        ended = ask(await_end)
    if flags().json:
        json_value(ended)
        fail_unless_succeeded(ended)
    else:
        conclude(ended)


@run.command()
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option("--reason", metavar="TEXT", help="Kept with the run.")
@click.option("--force", is_flag=True, help="Without grace: kill it now.")
def cancel(run_id: str, reason: str | None, force: bool) -> None:
    """Ask for a run's end; one that nothing executes ends at once."""

    shown = ask(lambda client: client.runs.cancel(run_id, reason=reason, force=force))
    if flags().json:
        json_value(shown)
    elif shown.status == "cancelled":
        note(f"{shown.id} is cancelled")
    else:
        note(f"{shown.id} is {shown.status}, cancel requested; helmr run wait {shown.id} waits for its end")
