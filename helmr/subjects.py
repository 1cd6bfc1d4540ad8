"""Every NATS subject Helmr uses, built and parsed here and nowhere else.

The word list of the subjects (``<scope>`` is ``<project>.<environment>``)::

    helmr.ev.<scope>.<entity>.<id>.<kind>[.<lane>.<priority>]   events, stored in RUNS; entity: run, session,
                                                                workspace, queue, token, access, exec
    helmr.event.<scope>.…                                       the same, republished for core-NATS subscribers
    helmr.log.<scope>.<owner>.<id>.<attempt>.<stream>           log chunks, stored in LOGS; owner: run
    helmr.io.<scope>.<session>.<in|out>.<stream>                records of session streams, stored in SESSIONS
    helmr.once.<scope>.<session>.<key>                          what a record's idempotency key stands for, stored in SESSIONS
    helmr.timer.<scope>.run.<id>.<what>                         pending timers, stored in RUNS; what: retry, ttl
    helmr.due.<scope>.run.<id>.<what>                           what a timer publishes when it fires, stored in RUNS
    helmr.api.<scope>.<noun>.<verb>                             request/reply services
    helmr.worker.<worker>.<verb>                                request/reply to one worker
    helmr.exec.<scope>.<exec>.out.<stream>                      what an exec writes, stored in EXECS
    helmr.exec.<scope>.<exec>.raw.<stream>                      the same of one whose output is not kept
    helmr.exec.<scope>.<exec>.in                                frames from its clients to its worker
    helmr.exec.<scope>.<exec>.client.<client>                   frames from its worker to one client

Whatever is put into a subject is checked: a name that is not one token raises :class:`~helmr.errors.UsageError`.
It lives in :mod:`helmr` because the client needs it, too, and must not import the bus.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from helmr.errors import UsageError

Entity = Literal["run", "session", "workspace", "queue", "token", "access", "exec"]

_EVENTS = "helmr.ev"
_LIVE = "helmr.event"
_LOGS = "helmr.log"
_IO = "helmr.io"
_ONCE = "helmr.once"
_TIMERS = "helmr.timer"
_DUE = "helmr.due"
_API = "helmr.api"
_WORKER = "helmr.worker"
_EXEC = "helmr.exec"

#: Kinds that share the subject token ``journal``, so that a chatty run costs the server one subject, not five.
JOURNAL_KINDS = frozenset({"step", "output", "metadata", "token_created", "log"})

ALL_EVENTS = f"{_EVENTS}.>"
ALL_LIVE = f"{_LIVE}.>"
ALL_LOGS = f"{_LOGS}.>"
ALL_IO = f"{_IO}.>"
ALL_ONCE = f"{_ONCE}.>"
ALL_INPUT = f"{_IO}.*.*.*.in.*"
ALL_TIMERS = f"{_TIMERS}.>"
ALL_DUE = f"{_DUE}.>"
ALL_EXEC_OUTPUT = f"{_EXEC}.*.*.*.out.*"


#: What ids, lanes and stream names are made of. Some come from clients and from task code: a dot or a wildcard would reach
#: into other entities, and a line break into the protocol itself.
_TOKEN = re.compile(r"[A-Za-z0-9_@~-]+")


def _token(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise UsageError(f"{text[:80]!r} cannot be an id or a name", hint="use letters, digits, - and _")
    return text


def _token_or_any(text: str) -> str:
    return text if text == "*" else _token(text)


class Scope(NamedTuple):
    """The project and environment that everything belongs to."""

    project: str
    environment: str

    def __str__(self) -> str:
        return f"{self.project}.{self.environment}"


class EventSubject(NamedTuple):
    """What the subject of a stored event says."""

    scope: Scope
    entity: str
    id: str
    kind: str
    lane: str | None = None
    priority: str | None = None


def event(scope: Scope, entity: Entity, entity_id: str, kind: str, *, lane: str = "", priority: int = 0) -> str:
    """The subject an event is stored under; ``queued`` run events carry the lane they are dispatched in."""
    base = f"{_EVENTS}.{scope}.{entity}.{_token(entity_id)}.{'journal' if kind in JOURNAL_KINDS else kind}"
    return f"{base}.{_token(lane)}.{priority}" if lane else base


def parse_event(subject: str) -> EventSubject:
    """The parts of a stored event's subject."""
    _, _, project, environment, entity, entity_id, kind, *rest = subject.split(".")
    lane, priority = rest if len(rest) == 2 else (None, None)
    return EventSubject(Scope(project, environment), entity, entity_id, kind, lane, priority)


def history(scope: Scope, entity: Entity, entity_id: str) -> str:
    """The filter for all events of one entity.

    Also the one string for ``Nats-Expected-Last-Subject-Sequence-Subject``: on a replicated stream the server compares
    in-flight filters as strings, so every writer must use this very one.
    """
    return f"{_EVENTS}.{scope}.{entity}.{_token(entity_id)}.>"


def anywhere(entity: Entity, entity_id: str) -> str:
    """The filter for all events of one entity, whatever its scope: ids are unique."""
    return f"{_EVENTS}.*.*.{entity}.{_token(entity_id)}.>"


def of_kind(entity: Entity, kind: str) -> str:
    """The filter for one kind of event of every entity in every scope."""
    return f"{_EVENTS}.*.*.{entity}.*.{kind}"


def created(scope: Scope, entity: Entity) -> str:
    """The filter for the first event of every entity of a kind in a scope."""
    return f"{_EVENTS}.{scope}.{entity}.*.created"


def lane(name: str) -> str:
    """The filter of a dispatch consumer: what is queued in this lane (``*``: in any), in every scope."""
    return f"{_EVENTS}.*.*.run.*.queued.{_token_or_any(name)}.*"


def live(scope: Scope, entity: Entity | Literal["*"] = "*", entity_id: str = "*", kind: str = ">") -> str:
    """What a core-NATS subscriber listens to for republished events."""
    return f"{_LIVE}.{scope}.{entity}.{_token_or_any(entity_id)}.{kind}"


def log(scope: Scope, run_id: str, attempt: int | Literal["*"], stream: str, owner: str = "run") -> str:
    """The subject of log chunks; also a filter, with ``*`` for attempt or stream."""
    return f"{_LOGS}.{scope}.{owner}.{_token_or_any(run_id)}.{attempt}.{_token_or_any(stream)}"


class LogSubject(NamedTuple):
    """What the subject of a log chunk says."""

    scope: Scope
    owner: str
    id: str
    attempt: int
    stream: str


def parse_log(subject: str) -> LogSubject:
    """The parts of a log chunk's subject."""
    _, _, project, environment, owner, owner_id, attempt, stream = subject.split(".")
    return LogSubject(Scope(project, environment), owner, owner_id, int(attempt), stream)


def io(scope: Scope, session_id: str, direction: Literal["in", "out", "*"], stream: str = "*") -> str:
    """The subject of the records of a session stream; also a filter."""
    return f"{_IO}.{scope}.{_token(session_id)}.{direction}.{_token_or_any(stream)}"


def about(subject: str) -> str:
    """The id of what a stored message is about: the entity of an event or of what is due, the session of a record.

    A subject that has no such place is about itself.
    """
    parts, place = subject.split("."), 4 if is_io(subject) else 5
    return parts[place] if len(parts) > place else subject


class IoSubject(NamedTuple):
    """What the subject of a stream record says."""

    scope: Scope
    session_id: str
    direction: str
    stream: str


def parse_io(subject: str) -> IoSubject:
    """The parts of a stream record's subject."""
    _, _, project, environment, session_id, direction, stream = subject.split(".")
    return IoSubject(Scope(project, environment), session_id, direction, stream)


def is_io(subject: str) -> bool:
    """Whether a stored message of SESSIONS is a record."""
    return subject.startswith(f"{_IO}.")


def once(scope: Scope, session_id: str, key: str) -> str:
    """The subject of the note that an idempotency key has been used; ``key`` is a digest."""
    return f"{_ONCE}.{scope}.{_token(session_id)}.{_token(key)}"


def all_once(scope: Scope, session_id: str) -> str:
    """The filter for the notes about used idempotency keys of a session."""
    return f"{_ONCE}.{scope}.{_token(session_id)}.*"


def timer(scope: Scope, run_id: str, what: str) -> str:
    """The subject under which a pending timer of a run is stored: one timer per subject, the latest wins."""
    return f"{_TIMERS}.{scope}.run.{_token(run_id)}.{what}"


def due(scope: Scope, run_id: str, what: str) -> str:
    """The subject a timer of a run publishes to when it fires."""
    return f"{_DUE}.{scope}.run.{_token(run_id)}.{what}"


def all_due(scope: Scope, entity_id: str) -> str:
    """The filter for everything that the timers of one entity have published."""
    return f"{_DUE}.{scope}.run.{_token(entity_id)}.*"


def parse_due(subject: str) -> tuple[Scope, str, str]:
    """Scope, run id and what is due."""
    _, _, project, environment, _, run_id, what = subject.split(".")
    return Scope(project, environment), run_id, what


def api(scope: Scope, noun: str, verb: str) -> str:
    """The subject a client sends a request to."""
    return f"{_API}.{scope}.{noun}.{verb}"


def api_endpoint(noun: str, verb: str) -> str:
    """The subject a service listens on, for every scope."""
    return f"{_API}.*.*.{noun}.{verb}"


def parse_api(subject: str) -> tuple[Scope, str, str]:
    """Scope, noun and verb of a request."""
    _, _, project, environment, noun, verb = subject.split(".")
    return Scope(project, environment), noun, verb


def worker(worker_id: str, verb: str) -> str:
    """The subject for a request to one worker."""
    return f"{_WORKER}.{_token(worker_id)}.{verb}"


def exec_output(scope: Scope, exec_id: str, stream: str = "*", *, kept: bool = True) -> str:
    """The subject of what an exec writes; also a filter."""
    return f"{_EXEC}.{scope}.{_token(exec_id)}.{'out' if kept else 'raw'}.{_token_or_any(stream)}"


class ExecSubject(NamedTuple):
    """What the subject of an exec's output says."""

    scope: Scope
    id: str
    stream: str


def parse_exec_output(subject: str) -> ExecSubject:
    """The parts of the subject of an exec's output, kept or not."""
    _, _, project, environment, exec_id, _, stream = subject.split(".")
    return ExecSubject(Scope(project, environment), exec_id, stream)


def exec_input(scope: Scope, exec_id: str) -> str:
    """The subject of the frames that clients send to the worker of an exec."""
    return f"{_EXEC}.{scope}.{_token(exec_id)}.in"


def exec_client(scope: Scope, exec_id: str, client: str) -> str:
    """The subject of the frames that the worker of an exec sends to one of its clients."""
    return f"{_EXEC}.{scope}.{_token(exec_id)}.client.{_token(client)}"
