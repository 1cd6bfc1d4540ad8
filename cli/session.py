"""``helmr session``: start, list, get, close, cancel; its streams are in :mod:`cli.session_streams`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from cli.follow import LogPrinter, conclude, fail_unless_succeeded, follow, goes_on, still_running
from cli.options import DURATION, Choice, Flags, Group, ask, flags
from cli.output import age, compact, json_line, json_value, line, moment, note, show, table, working
from cli.payload import metadata_of, payload_of
from cli.references import SESSION, TASK, WORKSPACE
from cli.session_streams import input_, output
from cli.workspace_cp import bring, uploads_of
from helmr.errors import TimedOut, UsageError
from helmr.models import Session


@click.group(cls=Group)
def session() -> None:
    """Start, list, show, close and cancel sessions; send them input and read their output."""


session.add_command(input_)
session.add_command(output)


@session.command()
@click.argument("task", type=TASK)
@click.option(
    "--payload", "pairs", multiple=True, metavar="KEY=VALUE", help="A field; JSON where it can be; a.b=1 nests."
)
@click.option("--payload-json", metavar="JSON", help="The whole payload.")
@click.option("--payload-file", metavar="FILE", help="The whole payload as JSON from a file; - reads stdin.")
@click.option("--external-id", metavar="ID", help="Your own id: the same start is then made only once.")
@click.option("--workspace", type=WORKSPACE, help="Run on the files of this workspace; default: a new one.")
@click.option(
    "--upload",
    "uploads",
    multiple=True,
    metavar="PATH[:DEST]",
    help="Copy this into the workspace before the run begins.",
)
@click.option("--queue", metavar="NAME", help="Instead of the task's queue.")
@click.option("--concurrency-key", metavar="KEY", help="What the queue's limit per key counts by.")
@click.option("--priority", type=int, default=0, show_default=True, help="Seconds of head start in its queue.")
@click.option("--ttl", type=DURATION, metavar="D", help="Expire the run unless it has begun by then.")
@click.option(
    "--expires-in", type=DURATION, metavar="D", help="End the session, and what it runs then, after this time."
)
@click.option("--max-duration", type=DURATION, metavar="D", help="Instead of the task's, e.g. 15m.")
@click.option("--metadata-json", metavar="JSON", help="Metadata the run begins with: an object.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Can be given several times.")
@click.option("--wait", is_flag=True, help="Wait for the end; prints the output.")
@click.option("--follow", "following", is_flag=True, help="Print what the run writes until it ends, then its output.")
@click.option("--timeout", type=DURATION, metavar="D", help="Wait or follow no longer than this; the run goes on.")
def start(
    *,
    task: str,
    pairs: tuple[str, ...],
    payload_json: str | None,
    payload_file: str | None,
    metadata_json: str | None,
    uploads: tuple[str, ...],
    wait: bool,
    following: bool,
    timeout: float | None,
    **options: Any,
) -> None:
    """Start a session of TASK with its first run; prints the run's id.

    --upload copies a folder or file as `helmr workspace cp` does, into a workspace made for it, or that of --workspace.

    With --wait and --follow the exit code is 3 when the run ends other than succeeded, and 7 at --timeout.
    """
    if timeout is not None and not (wait or following):
        raise UsageError("--timeout is for --wait and --follow", hint="--ttl and --max-duration limit the run itself")
    options["payload"] = payload_of(pairs, payload_json, payload_file)
    metadata = metadata_of(metadata_json, example='{"phase": "planning"}')
    given = flags()
    uploading = uploads_of(uploads)
    if uploading and options["external_id"] and not options["workspace"]:
        raise UsageError("--upload and --external-id need --workspace", hint="make one with `helmr workspace create`")
    starting = _Start(given, task, options | {"metadata": metadata}, timeout, uploading)
    how = starting.follow if following else starting.wait if wait else starting.only
    try:
        asyncio.run(how())
    except KeyboardInterrupt:
        if starting.run_id:
            note(f"\n{goes_on(starting.run_id)}")
        raise


class _Start:
    """One start, and what comes after it."""

    def __init__(
        self, given: Flags, task: str, options: dict[str, Any], timeout: float | None, uploads: list[tuple[str, str]]
    ) -> None:
        self._flags = given
        self._task = task
        self._options = options
        self._timeout = timeout
        self._uploads = uploads
        self.run_id: str | None = None

    async def only(self) -> None:
        """Print the run's id."""
        async with self._flags.client() as client:
            started = await self._start(client)
        if self._flags.json:
            json_value(_record(started))
            return
        self._say(started)
        line(started.run.id)

    async def wait(self) -> None:
        """Print the run's output once it has ended."""
        async with self._flags.client() as client:
            started = await self._start(client)
            if not self._flags.json:
                self._say(started)
            with working(f"waiting for {started.run.id}"):
                try:
                    run = await started.run.wait(timeout=self._timeout)
                except TimedOut:
                    raise still_running(started.run.id, self._timeout) from None
        if self._flags.json:
            json_value(_record(started) | {"run": run})
            fail_unless_succeeded(run)
        else:
            conclude(run)

    async def follow(self) -> None:
        """Print what the run writes, then its output."""
        as_json = self._flags.json
        async with self._flags.client() as client:
            started = await self._start(client)
            if as_json:
                json_line({"type": "started"} | _record(started))
            else:
                self._say(started)
            printer = LogPrinter(as_json=as_json)
            run = await follow(client, started.run.id, printer, timeout=self._timeout)
            printer.end()
            printer.end_line()
        if as_json:
            json_line({"type": "run", "run": run})
            fail_unless_succeeded(run)
        else:
            conclude(run)

    async def _start(self, client: Any) -> Any:
        async with bring(client, self._task, self._options["workspace"], self._uploads) as workspace:
            started = await client.sessions.start(self._task, **self._options | {"workspace": workspace})
        self.run_id = started.run.id
        return started

    def _say(self, started: Any) -> None:
        verb = "found" if started.reused else "started"
        version = started.run.record.deployment_version
        note(f"{verb} {started.run.id} of {self._task} {version}, session {started.session.id}", dim=True)


def _record(started: Any) -> dict[str, Any]:
    return {"session": started.session, "run": started.run.record, "reused": started.reused}


@session.command("list")
@click.option("--status", type=Choice(["open", "closed", "cancelled", "expired"]), help="Only these.")
@click.option("--task", type=TASK, help="Only sessions of this task.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
def list_(status: str | None, task: str | None, limit: int) -> None:
    """List sessions, newest first."""

    found = ask(lambda client: client.sessions.list(status=status, task=task, limit=limit))
    if flags().json:
        json_value(found)
        return
    rows = [
        (each.id, each.task_id, each.status, each.activity, each.turn, each.external_id, age(each.created_at))
        for each in found
    ]
    table(("SESSION", "TASK", "STATUS", "ACTIVITY", "TURN", "EXTERNAL ID", "CREATED"), rows)


@session.command()
@click.argument("session_id", metavar="SESSION", type=SESSION)
def get(session_id: str) -> None:
    """Show a session."""

    _show(ask(lambda client: client.sessions.get(session_id)))


@session.command()
@click.argument("session_id", metavar="SESSION", type=SESSION)
def close(session_id: str) -> None:
    """Take no more input; refused while a run is active."""

    _show(ask(lambda client: client.sessions.close(session_id)))


@session.command()
@click.argument("session_id", metavar="SESSION", type=SESSION)
@click.option("--reason", metavar="TEXT", help="Kept with the session.")
def cancel(session_id: str, reason: str | None) -> None:
    """Cancel a session and its current run."""

    _show(ask(lambda client: client.sessions.cancel(session_id, reason=reason)))


def _show(shown: Session) -> None:
    show(
        shown,
        {
            "id": shown.id,
            "status": shown.status,
            "activity": shown.activity,
            "reason": shown.reason,
            "task": shown.task_id,
            "scope": f"{shown.project}/{shown.environment}",
            "external id": shown.external_id,
            "run": shown.run_id,
            "turn": shown.turn,
            "workspace": shown.workspace_id,
            "deployment": shown.deployment_id,
            "tags": ", ".join(shown.tags) or None,
            "metadata": compact(shown.metadata),
            "created": moment(shown.created_at),
            "finished": moment(shown.finished_at),
        },
    )
