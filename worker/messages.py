"""What a task says on its control channel, checked: it is the task's own code that speaks, and it may say anything."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from helmr.errors import HelmrError
from worker.masking import Masker

#: Bytes of JSON of a run's metadata (DESIGN: limits).
MAX_METADATA = 256 * 1024


class Broken(HelmrError):
    """The task broke the protocol of its control channel; not by the authoring API, which would have refused."""


class Started(msgspec.Struct, frozen=True, tag_field="op", tag="started"):
    """The function is about to be called."""


class LogLine(msgspec.Struct, frozen=True, tag_field="op", tag="log"):
    """One call of the logger."""

    level: str
    message: str
    at: str
    fields: dict[str, Any] = {}


class Metadata(msgspec.Struct, frozen=True, tag_field="op", tag="metadata"):
    """The whole new document, and the keys that changed."""

    metadata: dict[str, Any]
    changed: list[str] = []
    n: int = 0


class Record(msgspec.Struct, frozen=True, tag_field="op", tag="output"):
    """One record for an output stream."""

    stream: str
    data: Any = None
    correlation_id: str | None = None
    n: int | None = None
    main: bool = True


class StepOver(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="op", tag="step"):
    """A durable step is over: to be recorded, and answered when it is."""

    id: int
    call: Literal["step", "now", "uuid4", "random"]
    name: str
    n: int
    main: bool
    result: Any = None
    error: dict[str, str] | None = None
    metadata: dict[str, Any] | None = None


class Wait(msgspec.Struct, frozen=True, tag_field="op", tag="wait"):
    """The task waits; answered when that is over. ``timeout`` in seconds."""

    id: int
    name: str
    n: int
    main: bool
    kind: Literal["stream", "token", "timer"]
    stream: str | None = None
    token: str | None = None
    correlation_id: str | None = None
    timeout: float | None = None
    due: datetime | None = None


class Peek(msgspec.Struct, frozen=True, tag_field="op", tag="peek"):
    """Which record a wait would get at once."""

    id: int
    name: str
    n: int
    main: bool
    stream: str
    correlation_id: str | None = None


class NewToken(msgspec.Struct, frozen=True, tag_field="op", tag="token"):
    """The task wants a token; ``timeout`` in seconds."""

    id: int
    n: int
    main: bool
    timeout: float
    name: str = ""
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}


class NewSecret(msgspec.Struct, frozen=True, tag_field="op", tag="secret"):
    """The task wants a secret for a token."""

    id: int
    token: str


class ResultPart(msgspec.Struct, frozen=True, tag_field="op", tag="result_part"):
    """A piece of a long output's JSON text."""

    data: str


class Result(msgspec.Struct, frozen=True, tag_field="op", tag="result"):
    """What the task returned, or of how many pieces that is."""

    output: Any = None
    parts: int | None = None


class Error(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="op", tag="error"):
    """How the task failed."""

    message: str = "the task failed"
    code: str = "task_error"
    type: str | None = None
    traceback: str | None = None
    where: str | None = None
    hint: str | None = None
    path: str | None = None
    exit_code: int | None = None


class EndedByCancel(msgspec.Struct, frozen=True, tag_field="op", tag="cancelled"):
    """The function ended because it was asked to."""


#: What says what a message is and whom it is about; everything else in it is content.
_IDENTITY = frozenset({"op", "kind", "name", "stream", "level", "at", "code", "correlation_id", "call", "token"})


def masked(body: dict[str, Any], masker: Masker) -> dict[str, Any]:
    """The message without the values of secrets. The pieces of an output are masked when they have been put together."""
    if body.get("op") == "result_part":
        return body
    return {key: value if key in _IDENTITY else masker.json(value) for key, value in body.items()}


#: What is answered.
Question = StepOver | Peek | NewToken | NewSecret
#: What is taken note of.
Statement = Started | LogLine | Metadata | Record | ResultPart | Result | Error | EndedByCancel
TaskMessage = Statement | Question | Wait


def parse(body: dict[str, Any]) -> TaskMessage:
    """The message that a control frame holds.

    Raises:
        Broken: it is none, or exceeds a limit.
    """
    try:
        message: TaskMessage = msgspec.convert(body, TaskMessage)
    except msgspec.ValidationError as error:
        raise Broken(f"the task broke the protocol of its control channel: {error}") from error
    if isinstance(message, Metadata) and len(msgspec.json.encode(message.metadata)) > MAX_METADATA:
        raise Broken(f"the task sent metadata of more than {MAX_METADATA >> 10} KiB")
    return message
