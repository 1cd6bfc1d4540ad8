"""What the projector reads of the log's messages: the same vocabulary as :mod:`helmr.events`, decoded only as far as needed.

Times and JSON stay text, which DuckDB parses outside the interpreter's lock; fields without a column are skipped.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from helmr.access import AccessEvent
from helmr.events import SessionEvent, TokenEvent, WorkspaceEvent
from helmr.models import Deployment, StreamRecord

Raw = msgspec.Raw


class StoredState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """:class:`helmr.events.RunState` with times and JSON left as text: DuckDB parses them outside the GIL."""

    id: str
    status: str
    cursor: int
    session_id: str
    workspace_id: str
    deployment_id: str
    task_id: str
    turn: int = 0
    attempt: int | None = None
    dispatch_attempt: int = 0
    cancel: Raw = Raw()
    wait: Raw = Raw()
    metadata: Raw = Raw(b"{}")
    queue: str | None = None
    priority: int = 0
    concurrency_key: str | None = None
    max_duration: float = 900.0
    active_seconds: float = 0.0
    exit_code: int | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None


class StoredEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """:class:`helmr.events.RunEvent`, likewise."""

    cursor: int
    id: str
    run_id: str
    kind: str
    at: str
    attempt: int | None = None
    dispatch_attempt: int = 0
    source: str = "control"
    message: str = ""
    data: Raw = Raw(b"{}")
    state: StoredState


class StoredFailure(msgspec.Struct, frozen=True, gc=False):
    """Code and message of a failure."""

    code: str | None = None
    message: str | None = None


class StoredSpec(msgspec.Struct, frozen=True, gc=False):
    """What of :class:`helmr.events.RunSpec` has columns."""

    deployment_version: str = ""
    payload: Raw = Raw()
    payload_artifact: Raw = Raw()
    tags: list[str] = []
    secrets: list[str] = []
    ttl: float | None = None
    external_id: str | None = None


class StoredWait(msgspec.Struct, frozen=True, gc=False):
    """:class:`helmr.events.Wait`, likewise."""

    kind: str
    stream: str | None = None
    token: str | None = None
    correlation_id: str | None = None
    due: str | None = None
    since: str | None = None


class StoredLogs(msgspec.Struct, frozen=True, gc=False):
    """How many bytes of log an ended run left."""

    stdout: int = 0
    stderr: int = 0
    log: int = 0
    truncated: bool = False


class StoredData(msgspec.Struct, frozen=True, gc=False):
    """The fields of an event's data that have columns of their own."""

    worker: str | None = None
    name: str | None = None
    stream: str | None = None
    token: str | None = None
    reason: str | None = None
    cause: str | None = None
    spec: StoredSpec | None = None
    output: Raw = Raw()
    output_artifact: Raw = Raw()
    failure: Raw = Raw()
    logs: StoredLogs = StoredLogs()


NO_DATA = StoredData()
decode_event = msgspec.json.Decoder(StoredEvent).decode
decode_data = msgspec.json.Decoder(StoredData).decode
decode_failure = msgspec.json.Decoder(StoredFailure).decode
decode_wait = msgspec.json.Decoder(StoredWait).decode
decode_session = msgspec.json.Decoder(SessionEvent).decode
decode_workspace = msgspec.json.Decoder(WorkspaceEvent).decode
decode_token = msgspec.json.Decoder(TokenEvent).decode
decode_access = msgspec.json.Decoder(AccessEvent).decode
decode_record = msgspec.json.Decoder(StreamRecord).decode
decode_deployment = msgspec.json.Decoder(Deployment).decode


def text(raw: Raw) -> str | None:
    """The JSON text of a raw value; None where it is absent or null."""
    value = bytes(raw)
    return None if value in {b"", b"null"} else value.decode()


def instant(nanoseconds: int) -> str:
    """A point in time as DuckDB reads it, to the microsecond."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def between(start: str | None, end: str) -> float:
    """Seconds from ``start`` to ``end``, both RFC 3339; never negative."""
    if start is None:
        return 0.0
    return max((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), 0.0)
