"""A run's log on the terminal: bytes as they are, logger lines in one form, and how the run ended."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli.errors import colour
from cli.output import Streams, clock, json_line, line, note, on_terminal, span, to_json
from helmr.errors import RunFailed, TimedOut

if TYPE_CHECKING:
    from helmr.chunks import LogChunk
    from helmr.client.aio import AsyncClient
    from helmr.models import Event, Run

_LEVEL_COLOURS = {"DEBUG": "bright_black", "WARNING": "yellow", "ERROR": "red"}
#: The kinds of event that explain why a log pauses or begins again.
_TOLD = frozenset({"held", "lease_lost", "retry_scheduled", "cancel_requested"})


class LogPrinter:
    """Writes log chunks: stdout to stdout, stderr to stderr, logger lines to stderr as ``12:00:01 INFO message k=v``.

    With ``as_json`` everything is JSON lines on stdout; ``raw`` prints the ``log`` stream's own JSON lines there.
    """

    def __init__(self, *, as_json: bool = False, raw: bool = False) -> None:
        self._json = as_json
        self._raw = raw
        self._partial: dict[tuple[int, int], bytes] = {}
        self._open_line = False
        self._streams = Streams()

    def take(self, chunk: LogChunk) -> None:
        """Write one chunk at once."""
        if self._json:
            json_line(_chunk_record(chunk))
        elif chunk.tombstone is not None:
            note(f"-- {chunk.stream} ends here: {chunk.tombstone.replace('_', ' ')} --")
        elif chunk.stream == "log" and not self._raw:
            self._take_lines(chunk)
        else:
            self._streams.write(chunk.stream, chunk.data)
            self._open_line = not chunk.data.endswith(b"\n")

    def end(self) -> None:
        """Write what was held back because more could have followed."""
        self._streams.end()

    def _take_lines(self, chunk: LogChunk) -> None:
        place = (chunk.attempt, chunk.dispatch)
        *lines, self._partial[place] = (self._partial.get(place, b"") + chunk.data).split(b"\n")
        self.end_line()
        for each in lines:
            note(_logger_line(each))

    def end_line(self) -> None:
        """On a terminal, put what follows on a line of its own."""
        if self._open_line and on_terminal() and sys.stderr.isatty():
            note("")
        self._open_line = False


def _chunk_record(chunk: LogChunk) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "log", "stream": chunk.stream, "attempt": chunk.attempt, "at": chunk.at}
    record |= {"dispatch_attempt": chunk.dispatch, "offset": chunk.offset, "bytes": len(chunk.data)}
    if chunk.tombstone is not None:
        record["tombstone"] = chunk.tombstone
    try:
        record["text"] = chunk.data.decode()
    except UnicodeDecodeError:
        record["text"] = chunk.data.decode("utf-8", "replace")
        record["base64"] = base64.b64encode(chunk.data).decode()
    return record


def _logger_line(data: bytes) -> str:
    try:
        told = msgspec.json.decode(data, type=dict[str, Any])
        at = clock(datetime.fromisoformat(str(told["at"])))
    except (msgspec.DecodeError, KeyError, ValueError):
        return data.decode("utf-8", "replace")
    level = str(told.get("level", "info")).upper()
    fields = told.get("fields") or {}
    later = [str(fields.pop(name)) for name in ("exception",) if "\n" in str(fields.get(name, ""))]
    words = [f"{name}={_field(value)}" for name, value in fields.items()]
    shown = click.style(level, fg=_LEVEL_COLOURS.get(level)) if colour(sys.stderr) else level
    return "\n".join([" ".join([at, shown, str(told.get("message", "")), *words]), *later])


def _field(value: Any) -> str:
    if isinstance(value, str) and value and not any(char in ' "=\n\t' for char in value):
        return value
    return to_json(value)


async def follow(client: AsyncClient, run_id: str, printer: LogPrinter, *, timeout: float | None) -> Run:  # noqa: ASYNC109
    """Print what the run writes until it ends, and return it.

    Raises:
        TimedOut: it goes on after ``timeout`` seconds.
    """
    try:
        async with asyncio.timeout(timeout), asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(_tell(client.runs.events.subscribe(run_id), printer))
            async for chunk in client.runs.logs(run_id, follow=True):
                printer.take(chunk)
            telling.cancel()
    except TimeoutError:
        raise still_running(run_id, timeout) from None
    return await client.runs.get(run_id)


async def _tell(events: AsyncIterator[Event], printer: LogPrinter) -> None:
    async for event in events:
        if event.kind in _TOLD:
            printer.end_line()
            note(
                f"{clock(event.at)} -- {event.kind.replace('_', ' ')}: {event.message or to_json(event.data)} --",
                dim=True,
            )


def still_running(run_id: str, timeout: float | None) -> TimedOut:
    """The error for a run that was not waited for any longer."""
    hint = f"it goes on: helmr run wait {run_id}, helmr run cancel {run_id}"
    return TimedOut(f"run {run_id} has not ended within {timeout:g} s", hint=hint)


def goes_on(run_id: str) -> str:
    """What to say when Ctrl-C ends the watching."""
    return f"{run_id} goes on. Follow it again: helmr run logs {run_id} --follow; end it: helmr run cancel {run_id}"


def conclude(run: Run, *, output: bool = True) -> None:
    """Say how a run ended: a line on stderr, and its output as JSON on stdout.

    Raises:
        RunFailed: it ended other than ``succeeded``.
    """
    took = span(run.started_at or run.created_at, run.finished_at)
    if run.status == "succeeded":
        verb = click.style("succeeded", fg="green") if colour(sys.stderr) else "succeeded"
        note(f"{run.id} {verb} in {took}")
        if output:
            line(to_json(run.output, indent=on_terminal()))
        return
    failure = run.failure
    if failure is not None and failure.detail.get("traceback"):
        note(str(failure.detail["traceback"]).rstrip())
    why = f": {failure.code}: {failure.message}" if failure else ""
    if run.cancel_requested and run.cancel_requested.reason:
        why = why or f": {run.cancel_requested.reason}"
    hint = str(failure.detail["hint"]) if failure and failure.detail.get("hint") else f"see helmr run get {run.id}"
    raise RunFailed(f"run {run.id} {run.status} after {took}{why}", hint=hint)


def fail_unless_succeeded(run: Run) -> None:
    """For ``--json``, where the record has said everything: only the exit code.

    Raises:
        click.exceptions.Exit: the run ended other than ``succeeded``.
    """
    if run.status != "succeeded":
        raise click.exceptions.Exit(RunFailed.exit_code)
