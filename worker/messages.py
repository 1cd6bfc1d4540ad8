"""What a task says on its control channel, checked: it is the task's own code that speaks, and it may say anything."""

from __future__ import annotations

from typing import Any

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


class Record(msgspec.Struct, frozen=True, tag_field="op", tag="output"):
    """One record for an output stream."""

    stream: str
    data: Any = None
    correlation_id: str | None = None


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
_IDENTITY = frozenset({"op", "kind", "name", "stream", "level", "at", "code", "correlation_id"})


def masked(body: dict[str, Any], masker: Masker) -> dict[str, Any]:
    """The message without the values of secrets. The pieces of an output are masked when they have been put together."""
    if body.get("op") == "result_part":
        return body
    return {key: value if key in _IDENTITY else masker.json(value) for key, value in body.items()}


TaskMessage = Started | LogLine | Metadata | Record | ResultPart | Result | Error | EndedByCancel


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
