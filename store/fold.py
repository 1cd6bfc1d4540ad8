"""The pure fold from log messages to table rows: no I/O, so that every rule of the history can be tested by itself.

Each event carries the state that results from it, so a run's row is mostly its latest state. What the fold adds up
itself (the open attempt, the pending wait, sums over waits) is kept per unfinished run in a few words of memory, and
stored in ``runs_live`` so that a restart goes on where it stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bus.reader import Message
from helmr import subjects
from helmr.access import access_record
from helmr.events import TERMINAL
from helmr.models import ELSEWHERE, token_record, workspace_record
from helmr.subjects import JOURNAL_KINDS, Scope
from store.messages import (
    NO_DATA,
    Raw,
    StoredData,
    StoredEvent,
    StoredFailure,
    StoredSpec,
    StoredWait,
    between,
    decode_access,
    decode_data,
    decode_deployment,
    decode_event,
    decode_failure,
    decode_record,
    decode_session,
    decode_token,
    decode_wait,
    decode_workspace,
    instant,
    text,
)

Row = tuple[Any, ...]
#: Kinds that neither begin nor end an attempt or a wait.
_QUIET = JOURNAL_KINDS | {"held", "queued", "started", "cancel_requested"}

_EVENT_PREFIX = "helmr.ev."


@dataclass(slots=True)
class OpenRun:
    """What the fold itself adds up about an unfinished run."""

    first_seq: int | None = None
    waits: int = 0
    wait_seconds: float = 0.0
    attempt: int | None = None
    started_at: str | None = None
    worker: str | None = None
    leases: int = 0
    base: float = 0.0
    seq: int | None = None
    wait_seq: int | None = None
    wait: StoredWait | None = None


#: The latest of a run in this batch.
_Touched = tuple[Scope, OpenRun, StoredEvent, StoredData, Message]


@dataclass
class Fold:
    """Folds messages one by one; :meth:`take` hands over the rows of the batch and begins the next.

    ``open_runs`` must hold every unfinished run of the tables when the fold begins (:func:`restore`).
    """

    open_runs: dict[str, OpenRun] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    _runs: dict[str, _Touched] = field(default_factory=dict)
    _first: dict[str, tuple[StoredSpec, Message]] = field(default_factory=dict)
    #: By table, the latest row of each entity that is no run.
    _latest: dict[str, dict[str, Row]] = field(default_factory=lambda: defaultdict(dict))
    _known: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def event(self, message: Message) -> None:
        """Fold a message of RUNS; subjects and entities that are not projected are passed over.

        Raises:
            ValueError: the message cannot be understood; nothing was folded.
        """
        if not message.subject.startswith(_EVENT_PREFIX):
            return
        subject = subjects.parse_event(message.subject)
        match subject.entity:
            case "run":
                self._run(subject.scope, message)
            case "session":
                self._session(subject.scope, message)
            case "workspace":
                self._workspace(subject.scope, message)
            case "token":
                self._token(subject.scope, message)
            case "access":
                self._access(subject.scope, message)
            case _:
                return

    def record(self, message: Message) -> None:
        """Fold a message of SESSIONS: a record of a session stream; notes of used idempotency keys are passed over."""
        if not subjects.is_io(message.subject):
            return
        scope = subjects.parse_io(message.subject).scope
        record = decode_record(message.body)
        data = msgspec.json.encode(record.data).decode()
        head = (message.seq, *scope, record.session_id, record.direction, record.stream, record.sequence, record.id)
        tail = (record.correlation_id, record.run_id, record.access_id, record.at.isoformat(), data)
        self.rows["records"].append((*head, *tail))

    def config(self, message: Message) -> None:
        """Fold a message of the configuration bucket: a deployment, or which one is current."""
        noun, *key = message.subject.split(".")[2:]
        deleted = bool(message.headers and message.headers.get("KV-Operation"))
        if deleted or noun not in {"deployment", "current"}:
            return
        if noun == "current":
            project, environment = key
            self._latest["deployments_current"][f"{project}.{environment}"] = (
                project,
                environment,
                message.body.decode(),
                message.seq,
            )
            return
        made = decode_deployment(message.body)
        index = msgspec.json.encode(made.index).decode()
        head = (made.id, made.version, made.project, made.environment, made.content_hash, made.archive)
        self._latest["deployments_stored"][made.id] = (
            *head,
            made.archive_bytes,
            made.created_at.isoformat(),
            index,
            message.seq,
        )

    def replaced(self) -> dict[str, list[str]]:
        """By table, what of this batch may have a row from an earlier batch, which :meth:`take`'s takes the place of."""
        known = {
            "runs_live": [run for run in self._runs if run not in self._first],
            "deployments_stored": list(self._latest["deployments_stored"]),
            "deployments_current": list(self._latest["deployments_current"]),
            **self._known,
        }
        return {name: ids for name, ids in known.items() if ids}

    def take(self) -> dict[str, list[Row]]:
        """The rows of everything folded since the last call, by table; touched runs and sessions under their live table."""
        rows, self.rows = self.rows, defaultdict(list)
        rows["runs_live"] = [self._run_row(touched) for touched in self._runs.values()]
        rows |= {name: list(latest.values()) for name, latest in self._latest.items()}
        self._latest.clear()
        self._runs.clear()
        self._first.clear()
        self._known.clear()
        return {name: found for name, found in rows.items() if found}

    def unreadable(self, stream: str, message: Message, reason: str) -> None:
        """Note a message that had to be passed over."""
        self.rows["unreadable"].append((stream, message.seq, message.subject, reason))

    # Runs ---------------------------------------------------------------------------------------------------------

    def _run(self, scope: Scope, message: Message) -> None:
        event = decode_event(message.body)
        data = _hot(event)
        run = self.open_runs.get(event.run_id)
        if run is None:
            run = self.open_runs[event.run_id] = OpenRun(first_seq=message.seq)
            self._first[event.run_id] = (data.spec or StoredSpec(), message)
        touched = self._runs[event.run_id] = (scope, run, event, data, message)
        code = None
        if event.kind not in _QUIET:
            failure = _failure(data)
            code = failure.code
            self._advance(touched, failure)
        self.rows["events"].append(_event_row(scope, event, data, code, message.seq))

    def _advance(self, touched: _Touched, failure: StoredFailure) -> None:
        """Attempts open with a lease and end with a retry or the run; waits likewise, by their own events."""
        scope, run, event, data, message = touched
        state, kind = event.state, event.kind
        terminal = state.status in TERMINAL
        if kind == "leased":
            self._lease(run, event, data.worker, message.seq)
        elif kind == "waiting":
            run.wait = decode_wait(state.wait)
            run.waits += 1
            run.wait_seq = message.seq
        elif run.wait is not None and state.status != "waiting":
            self._end_wait(scope, run, event, kind.removeprefix("wait_"))
        if terminal or kind == "retry_scheduled":
            self._end_attempt(scope, run, event, failure, state.status if terminal else "failed")
        if terminal:
            del self.open_runs[event.run_id]

    @staticmethod
    def _lease(run: OpenRun, event: StoredEvent, worker: str | None, seq: int) -> None:
        if run.attempt != event.state.attempt:
            run.attempt, run.started_at, run.seq = event.state.attempt, event.at, seq
            run.leases, run.base = 0, event.state.active_seconds
        run.leases += 1
        run.worker = worker

    def _end_wait(self, scope: Scope, run: OpenRun, event: StoredEvent, outcome: str) -> None:
        wait = run.wait
        if wait is None:
            return
        began, ended = wait.since, event.at
        head = (*scope, event.run_id, event.state.task_id, wait.kind, wait.stream, wait.token, wait.correlation_id)
        self.rows["waits_closed"].append((*head, wait.due, began, ended, outcome, run.wait_seq))
        run.wait_seconds += between(began, ended)
        run.wait = run.wait_seq = None

    def _end_attempt(
        self, scope: Scope, run: OpenRun, event: StoredEvent, failure: StoredFailure, outcome: str
    ) -> None:
        if run.attempt is None:
            return
        spent = event.state.active_seconds - run.base
        head = (
            *scope,
            event.run_id,
            event.state.task_id,
            run.attempt,
            run.worker,
            run.leases,
            run.started_at,
            event.at,
        )
        self.rows["attempts_closed"].append((*head, spent, outcome, failure.code, failure.message, run.seq))
        run.attempt = run.started_at = run.worker = run.seq = None
        run.leases, run.base = 0, event.state.active_seconds

    def _run_row(self, touched: _Touched) -> Row:
        """In the order of :data:`store.tables.RUNS_LIVE`."""
        scope, run, event, data, message = touched
        state = event.state
        spec, first = self._first.get(event.run_id, (None, None))
        succeeded, ended = state.status == "succeeded", state.status in TERMINAL
        failure = data.failure if state.status == "failed" else Raw()
        return (
            *(state.id, state.status, state.task_id, *scope, state.session_id, state.turn, state.workspace_id),
            *(state.deployment_id, spec and spec.deployment_version, spec and _payload(spec)),
            *(text(data.output) if succeeded else None, text(data.output_artifact) if succeeded else None),
            *(text(failure), decode_failure(failure).code if failure else None, text(state.metadata)),
            *(spec and spec.tags, spec and spec.secrets, state.max_duration, state.attempt, state.dispatch_attempt),
            *(state.queue, state.priority, state.concurrency_key, spec and spec.ttl, spec and spec.external_id),
            *(text(state.cancel), text(state.wait), state.exit_code),
            *(state.created_at, state.started_at, state.finished_at, round(state.active_seconds, 6)),
            *(run.wait_seconds, run.waits, data.logs.stdout + data.logs.stderr + data.logs.log if ended else None),
            *(data.logs.truncated if ended else None, state.cursor, run.first_seq, message.seq),
            *(instant(first.stored_ns) if first else None, instant(message.stored_ns)),
            *(run.attempt, run.started_at, run.worker, run.leases, run.base, run.seq, run.wait_seq),
        )

    # Everything else --------------------------------------------------------------------------------------

    def _session(self, scope: Scope, message: Message) -> None:
        """In the order of :data:`store.tables.SESSIONS`."""
        s = decode_session(message.body).state
        finished = s.finished_at.isoformat() if s.finished_at else None
        if s.status != "open" and finished is None:
            raise ValueError(f"session {s.id} is {s.status} without an end")
        row = (
            *(s.id, s.status, s.task_id, *scope, s.external_id, s.workspace_id, s.deployment_id, s.run_id, s.turn),
            *(list(s.tags), msgspec.json.encode(s.metadata).decode(), s.reason),
            *(s.created_at.isoformat(), s.expires_at.isoformat() if s.expires_at else None, finished),
            *(s.cursor, message.seq),
        )
        self._keep("sessions_live", row, s.cursor)

    def _keep(self, table: str, row: Row, cursor: int) -> None:
        """Have a row, which begins with its id, take the place of the one before."""
        if cursor > 1 and row[0] not in self._latest[table]:
            self._known[table].append(row[0])
        self._latest[table][row[0]] = row

    def _workspace(self, scope: Scope, message: Message) -> None:
        """In the order of :data:`store.tables.WORKSPACES`."""
        event = decode_workspace(message.body)
        w = workspace_record(*scope, event.state)
        row = (
            *(w.id, w.state, w.sandbox, *scope, w.mount_path, w.worker, w.host, w.version, w.deployment_id),
            *(list(w.tags), msgspec.json.encode(w.metadata).decode()),
            *(w.created_at.isoformat(), w.updated_at.isoformat(), w.cursor, message.seq),
        )
        self._keep("workspaces", row, w.cursor)
        version = event.data.get("version")
        if isinstance(version, str):
            run, files, size = (event.data.get(key) for key in ("run_id", "files", "bytes"))
            self.rows["versions"].append((*scope, w.id, version, run, files, size, event.at.isoformat(), message.seq))

    def _token(self, scope: Scope, message: Message) -> None:
        """In the order of :data:`store.tables.TOKENS`."""
        t = token_record(*scope, decode_token(message.body))
        data = None if t.data is None else msgspec.json.encode(t.data).decode()
        finished = t.finished_at.isoformat() if t.finished_at else None
        row = (
            *(t.id, t.status, *scope, t.run_id, t.session_id, list(t.tags), msgspec.json.encode(t.metadata).decode()),
            *(data, t.reason, t.created_at.isoformat(), t.expires_at.isoformat(), finished, t.cursor, message.seq),
        )
        self._keep("tokens", row, t.cursor)

    def _access(self, scope: Scope, message: Message) -> None:
        """In the order of :data:`store.tables.ACCESS`."""
        a = access_record(*scope, decode_access(message.body).state)
        row = (
            *(a.id, a.status, *scope, a.action, a.session_id, a.stream, a.token_id, a.correlation_id, a.uses, a.used),
            *(a.note, a.reason, a.created_at.isoformat(), a.expires_at.isoformat()),
            *(a.finished_at.isoformat() if a.finished_at else None, a.cursor, message.seq),
        )
        self._keep("access", row, a.cursor)


def _hot(event: StoredEvent) -> StoredData:
    """The known fields of an event's data; a field of another type than expected is for ``data`` alone."""
    if event.data == b"{}":
        return NO_DATA
    try:
        return decode_data(event.data)
    except msgspec.ValidationError:
        return NO_DATA


def _failure(data: StoredData) -> StoredFailure:
    return decode_failure(data.failure) if text(data.failure) else StoredFailure()


def _event_row(scope: Scope, event: StoredEvent, data: StoredData, code: str | None, seq: int) -> Row:
    """In the order of :data:`store.tables.EVENTS`."""
    return (
        *(seq, *scope, event.run_id, event.cursor, event.id, event.kind, event.at, event.attempt),
        *(event.dispatch_attempt, event.source, event.message, data.worker, data.name or data.stream or data.token),
        *(data.reason or data.cause, code, bytes(event.data)),
    )


def restore(rows: Iterable[dict[str, Any]]) -> dict[str, OpenRun]:
    """The unfinished runs, from the rows of :data:`store.schema.LOAD_LIVE`."""
    return {
        row["id"]: OpenRun(
            first_seq=row["first_seq"],
            waits=row["waits"],
            wait_seconds=row["wait_seconds"],
            attempt=row["open_attempt"],
            started_at=row["open_started_at"],
            worker=row["open_worker"],
            leases=row["open_leases"],
            base=row["open_base"],
            seq=row["open_seq"],
            wait_seq=row["wait_seq"],
            wait=decode_wait(row["pending_wait"]) if row["pending_wait"] else None,
        )
        for row in rows
    }


def _payload(spec: StoredSpec) -> str | None:
    """As the run record has it: a large one by where it is."""
    if not spec.payload_artifact:
        return text(spec.payload)
    return f'{{"{ELSEWHERE}":{text(spec.payload_artifact)}}}'
