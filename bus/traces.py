"""The spans of a run, made of its events: from its start over queue, lease, preparation, execution and waits to its end.

Their ids follow from the run's id and the cursors of the events, so that telling of a run twice tells the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from helmr import leases, trace_ids
from helmr.events import TERMINAL, RunEvent
from helmr.subjects import JOURNAL_KINDS, Scope

#: Events that a span keeps, the first ones: what OpenTelemetry allows by default.
MAX_SPAN_EVENTS = 128
_MESSAGE = 1000

Attributes = dict[str, str | int | float | bool]


class SpanEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened within a span."""

    name: str
    at: datetime
    attributes: Attributes


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A finished span; ``parent`` is None for that of the whole run, ``error`` says why it went wrong, if it did."""

    name: str
    span_id: int
    parent: int | None
    begin: datetime
    end: datetime
    attributes: Attributes
    events: list[SpanEvent]
    error: str | None = None


class _Open:
    """A span that has not ended."""

    def __init__(self, name: str, key: str, parent: str | None, begin: datetime) -> None:
        self.name = name
        self.key = key
        self.parent = parent
        self.begin = begin
        self.attributes: Attributes = {}
        self.events: list[SpanEvent] = []


def spans(scope: Scope, events: Sequence[RunEvent]) -> list[Span]:
    """The spans of a run that has ended, as they began; the whole run first, and what surrounds another before it.

    ``events`` are all of its events, in order.
    """
    return _Trace(scope, events).spans


class _Trace:
    def __init__(self, scope: Scope, events: Sequence[RunEvent]) -> None:
        first, last = events[0], events[-1]
        self._run_id = first.run_id
        self._open: dict[str, _Open] = {}
        self._done: list[Span] = []
        self._going_on = leases.going_on(events)
        self._root = _Open(f"run {first.state.task_id}", "run", None, first.at)
        self._root.attributes = _of_run(scope, first, last)
        for event in events:
            self._take(event)
        for name in list(self._open):
            self._close(name, last)
        failed = last.data.get("failure", {}) if last.kind == "failed" else None
        whole = self._finish(self._root, last, _reason(failed) if failed is not None else None)
        self.spans = [whole, *sorted(self._done, key=lambda span: (span.begin, span.begin - span.end))]

    def _take(self, event: RunEvent) -> None:
        match event.kind:
            case "held" | "queued":
                self._leave_lease(event)
                self._close("held", event)
                self._close("retry", event)
                self._begin("held" if event.kind == "held" else "queue", event)
            case "leased":
                self._leave_lease(event)  # one that goes on at another worker is followed by the next at once
                self._lease(event)
            case "started":
                self._start(event)
            case "waiting":
                self._leave_lease(event)
                self._begin("wait", event)
            case "wait_completed" | "wait_timed_out" | "wait_cancelled":
                self._close("wait", event, outcome=event.kind.removeprefix("wait_"))
            case "lease_lost":
                self._leave_lease(event, error=f"lease lost: {event.data.get('reason', '')}")
            case "retry_scheduled":
                self._leave_lease(event, error=_reason(event.data.get("failure") or {}))
                self._begin("retry", event)
            case kind if kind in JOURNAL_KINDS:
                self._note(event)
            case kind if kind in TERMINAL:
                failure = event.data.get("failure")
                self._leave_lease(event, error=_reason(failure) if failure else None)
            case _:
                self._note(event)

    def _begin(self, name: str, event: RunEvent) -> None:
        opened = _Open(name, f"{name}/{event.cursor}", "run", event.at)
        for key in ("cause", "lane", "limit", "key", "kind", "stream", "token"):
            if isinstance(value := event.data.get(key), str):
                opened.attributes[f"helmr.{name}.{key}"] = value
        self._open[name] = opened

    def _lease(self, event: RunEvent) -> None:
        lease = _Open("lease", f"lease/{event.cursor}", "run", event.at)
        lease.attributes = {"helmr.worker": str(event.data.get("worker", "")), **_tries(event)}
        self._open["lease"] = lease
        if event.cursor in self._going_on:
            self._start(event)
        else:
            self._open["prepare"] = _Open("prepare", f"prepare/{event.cursor}", lease.key, event.at)

    def _start(self, event: RunEvent) -> None:
        self._close("prepare", event)
        lease = self._open.get("lease")
        if lease is not None:
            cursor = int(lease.key.partition("/")[2])
            execution = _Open("execute", trace_ids.execution(cursor), lease.key, event.at)
            execution.attributes = _tries(event)
            self._open["execute"] = execution

    def _leave_lease(self, event: RunEvent, *, error: str | None = None) -> None:
        for name in ("lease", "execute", "prepare", "queue"):
            self._close(name, event, error=error if name != "queue" else None)

    def _note(self, event: RunEvent) -> None:
        within = self._open.get("execute") or self._open.get("lease") or self._root
        if len(within.events) < MAX_SPAN_EVENTS:
            name = event.data.get("name") or event.data.get("stream")
            attributes: Attributes = {"helmr.name": name} if isinstance(name, str) else {}
            within.events.append(SpanEvent(name=event.kind, at=event.at, attributes=attributes))

    def _close(self, name: str, event: RunEvent, *, error: str | None = None, outcome: str | None = None) -> None:
        opened = self._open.pop(name, None)
        if opened is None:
            return
        if outcome is not None:
            opened.attributes[f"helmr.{name}.outcome"] = outcome
        self._done.append(self._finish(opened, event, error))

    def _finish(self, opened: _Open, event: RunEvent, error: str | None) -> Span:
        return Span(
            name=opened.name,
            span_id=trace_ids.span_id(self._run_id, opened.key),
            parent=trace_ids.span_id(self._run_id, opened.parent) if opened.parent else None,
            begin=opened.begin,
            end=max(event.at, opened.begin),  # clocks of several machines
            attributes=opened.attributes,
            events=opened.events,
            error=error,
        )


def _of_run(scope: Scope, first: RunEvent, last: RunEvent) -> Attributes:
    state = last.state
    spec: dict[str, Any] = first.data.get("spec") or {}
    found: Attributes = {
        "helmr.run.id": state.id,
        "helmr.project": scope.project,
        "helmr.environment": scope.environment,
        "helmr.task": state.task_id,
        "helmr.session.id": state.session_id,
        "helmr.workspace.id": state.workspace_id,
        "helmr.deployment.version": str(spec.get("deployment_version", "")),
        "helmr.run.status": state.status,
        "helmr.run.active_seconds": state.active_seconds,
    }
    optional = {"helmr.run.attempt": state.attempt, "helmr.queue": state.queue, "helmr.run.exit_code": state.exit_code}
    return found | {name: value for name, value in optional.items() if value is not None}


def _tries(event: RunEvent) -> Attributes:
    return {"helmr.run.attempt": event.attempt or 1, "helmr.run.dispatch_attempt": event.dispatch_attempt}


def _reason(failure: dict[str, Any]) -> str:
    return f"{failure.get('code', 'failed')}: {failure.get('message', '')}"[:_MESSAGE]
