"""The lives of runs as messages of the log, told by the real reducers, for tests of the history."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Self

import msgspec

from bus.log import ACCESS, TOKEN, Kind
from bus.reader import Message
from helmr import ids, subjects
from helmr.events import Draft, Limit, RunEvent, RunSpec, RunState, SessionEvent, WorkspaceEvent
from helmr.models import Run, StreamRecord, run_record
from helmr.reducers import run as run_rules
from helmr.reducers import run_fold
from helmr.reducers import session as session_rules
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Scope

SCOPE = Scope("acme", "dev")
START = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
Published = tuple[str, bytes]


class Life:
    """One run's events, in order; each happens ``after`` seconds after the one before."""

    def __init__(self, *, scope: Scope = SCOPE, start: datetime = START, **spec: Any) -> None:
        fixed = {
            "session_id": ids.new("ses"),
            "workspace_id": ids.new("ws"),
            "deployment_id": "dep_1",
            "deployment_version": "20260301.1",
            "task_id": "review",
            "payload": {"pr": 42, "title": "größer", "nested": {"z": 1, "a": [1, None, 2.5]}},
        }
        self.scope = scope
        self.id = ids.new("run")
        self.spec = RunSpec(**{**fixed, **spec})
        self.at = start
        self.events: list[RunEvent] = []

    @property
    def state(self) -> RunState | None:
        return self.events[-1].state if self.events else None

    def add(self, kind: str, data: dict[str, Any] | None = None, *, after: float = 1.0, message: str = "") -> Self:
        """One more event."""
        self.at += timedelta(seconds=after)
        body = data or {}
        state = run_fold.apply(self.state, kind, body, self.at, run_id=self.id)
        self.events.append(
            RunEvent(
                cursor=state.cursor,
                id=ids.new("evt"),
                run_id=self.id,
                kind=kind,
                at=self.at,
                attempt=state.attempt,
                dispatch_attempt=state.dispatch_attempt,
                message=message or kind,
                data=body,
                state=state,
            )
        )
        return self

    def queued(self, cause: str = "start", lane: str = "default") -> Self:
        data: dict[str, Any] = {"cause": cause, "lane": lane}
        if not self.events:
            data["spec"] = msgspec.to_builtins(self.spec)
        return self.add("queued", data)

    def held(self, limit: Limit = "queue", lane: str = "default") -> Self:
        """Held back, and admitted at once."""
        self.add("held", run_rules.create(self.spec, cause="start", lane=lane, limit=limit).data)
        return self.add("queued", {"cause": "start", "lane": lane})

    def leased(self, worker: str = "wrk_1") -> Self:
        state = self.state
        attempt = state.next_attempt if state else 1
        return self.add("leased", {"worker": worker, "attempt": attempt, "dispatch_attempt": 1}).add("started")

    def waits(self, outcome: str = "wait_completed", *, seconds: float = 30.0) -> Self:
        self.add("waiting", {"kind": "stream", "stream": "approval", "correlation_id": "pr-42"})
        return self.add(outcome, {"sequence": 1, "seq": 1}, after=seconds).queued("resume").leased()

    def retries(self, code: str = "task_error") -> Self:
        state = self.state
        attempt = (state.attempt or 1) + 1 if state else 2
        failure = {"code": code, "message": "again"}
        data = {"attempt": attempt, "at": self.at.isoformat(), "failure": failure}
        return self.add("retry_scheduled", data).queued("retry").leased("wrk_2")

    def succeeds(self, output: Any = None) -> Self:
        logs = {"stdout": 10, "stderr": 5, "log": 0, "truncated": False}
        return self.add("succeeded", {"output": output, "exit_code": 0, "logs": logs})

    def fails(self, code: str = "task_error", message: str = "it broke") -> Self:
        failure = {"code": code, "message": message, "detail": {"line": 3}}
        return self.add("failed", {"failure": failure, "exit_code": 1})

    @property
    def record(self) -> Run:
        """The run as control would show it."""
        return run_record(*self.scope, self.spec, self.events[-1])

    def published(self) -> list[Published]:
        """Subjects and bodies."""
        return [(self._subject(event), msgspec.json.encode(event)) for event in self.events]

    def _subject(self, event: RunEvent) -> str:
        lane = event.data["lane"] if event.kind == "queued" else ""
        return subjects.event(self.scope, "run", self.id, event.kind, lane=lane)


def lives(number: int, *, scope: Scope = SCOPE, start: datetime = START) -> list[Life]:
    """Runs of every kind of fate, ``number`` of them."""

    def life(at: int) -> Life:
        return Life(scope=scope, start=start + timedelta(minutes=at), task_id=f"task-{at % 3}", tags=(f"t{at}",))

    fates = (
        lambda at: life(at).queued().leased().succeeds({"n": at}),
        lambda at: life(at).held().leased().waits().succeeds(),
        lambda at: life(at).queued().leased().retries().fails("out_of_memory"),
        lambda at: life(at).queued().leased().add("step", {"name": "fetch", "result": [at]}),
        lambda at: life(at).queued().leased().add("waiting", {"kind": "token", "token": "tok_1"}),
        lambda at: life(at).queued().add("cancelled", {"reason": "no need"}),
        lambda at: life(at).queued(),
        lambda at: life(at).queued().leased().add("metadata", {"metadata": {"phase": "end"}}).fails(),
    )
    return [fates[at % len(fates)](at) for at in range(number)]


def messages(published: list[Published], *, first: int = 1) -> list[Message]:
    """What the stream would deliver."""
    stored = int(START.timestamp()) * 10**9
    return [
        Message(first + at, subject, stored + at * 1000, None, body) for at, (subject, body) in enumerate(published)
    ]


def session(life: Life, *, ends: str | None = None) -> list[Published]:
    """The events of the session of a run."""
    opened: dict[str, Any] = {
        "task_id": life.spec.task_id,
        "workspace_id": life.spec.workspace_id,
        "deployment_id": life.spec.deployment_id,
        "run_id": life.id,
        "external_id": f"ext-{life.id}",
        "tags": ["nightly"],
        "metadata": {"who": "ada"},
    }
    told: list[tuple[str, dict[str, Any]]] = [("opened", opened), *([(ends, {"reason": "done"})] if ends else [])]
    state, published = None, []
    for kind, data in told:
        state = session_rules.apply(state, kind, data, life.at, session_id=life.spec.session_id)
        event = SessionEvent(
            cursor=state.cursor, id=ids.new("evt"), session_id=state.id, kind=kind, at=life.at, data=data, state=state
        )
        published.append((subjects.event(life.scope, "session", state.id, kind), msgspec.json.encode(event)))
    return published


def workspace(life: Life, *, live: bool = False) -> list[Published]:
    """The events of the workspace of a run."""
    created = {"sandbox": "box", "fingerprint": "f", "deployment_id": "dep_1", "mount_path": "/workspace"}
    told = [("created", created), *([("materialized", {"worker": "wrk_1", "host": "host_1"})] if live else [])]
    state, published = None, []
    for kind, data in told:
        state = workspace_rules.apply(state, kind, data, life.at, workspace_id=life.spec.workspace_id)
        event = WorkspaceEvent(
            cursor=state.cursor, id=ids.new("evt"), workspace_id=state.id, kind=kind, at=life.at, data=data, state=state
        )
        published.append((subjects.event(life.scope, "workspace", state.id, kind), msgspec.json.encode(event)))
    return published


def token(*tags: str, data: Any = None, scope: Scope = SCOPE) -> list[Published]:
    """The events of a token; with ``data`` it is completed."""
    token_id, expires_at = ids.new("tok"), START + timedelta(hours=1)
    drafts = [Draft(kind="created", data={"expires_at": expires_at.isoformat(), "tags": list(tags)})]
    drafts += [Draft(kind="completed", data={"data": data})] if data is not None else []
    return _told(TOKEN, scope, token_id, drafts)


def access(*, uses: int | None = None, session_id: str = "ses_1", scope: Scope = SCOPE) -> list[Published]:
    """The events of an access token; with ``uses``, it is used once."""
    allowed = {"action": "append", "session_id": session_id, "stream": "approval", "hash": "0" * 64, "uses": uses}
    drafts = [Draft(kind="created", data=allowed | {"expires_at": (START + timedelta(hours=1)).isoformat()})]
    drafts += [Draft(kind="used", data={"key": "k"})] if uses else []
    return _told(ACCESS, scope, ids.new("acc"), drafts)


def _told(kind: Kind[Any, Any], scope: Scope, entity_id: str, drafts: list[Draft]) -> list[Published]:
    state, published = None, []
    for draft in drafts:
        event = kind.make(state, entity_id, draft)
        state = event.state
        published.append((subjects.event(scope, kind.name, entity_id, draft.kind), msgspec.json.encode(event)))
    return published


def record(session_id: str, sequence: int, data: Any, *, scope: Scope = SCOPE, stream: str = "approval") -> Published:
    """A record of a session's input stream."""
    body = StreamRecord(
        id=ids.new("evt"), session_id=session_id, stream=stream, direction="in", sequence=sequence, data=data, at=START
    )
    return subjects.io(scope, session_id, "in", stream), msgspec.json.encode(body)
