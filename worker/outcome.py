"""How a run ends, judged from what its process said and how it exited: a pure function, so that every case can be tested."""

from __future__ import annotations

import json
import signal
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.exceptions import best_match

from helmr.events import Failure, FailureCode
from worker.engine import Exited

#: Bytes of JSON a run may return (DESIGN: limits).
MAX_OUTPUT = 512 * 1024


class Said(msgspec.Struct):
    """What the task said about its end, gathered while it ran."""

    output: Any = None
    returned: bool = False
    parts: list[str] = []
    error: dict[str, Any] | None = None
    cancelled: bool = False

    def hear(self, body: dict[str, Any]) -> None:
        """Take note of a ``result_part``, ``result``, ``error`` or ``cancelled`` message."""
        match body["op"]:
            case "result_part":
                self.parts.append(body["data"])
            case "result":
                self.returned = True
                self.output = json.loads("".join(self.parts)) if "parts" in body else body.get("output")
            case "error":
                self.error = body
            case "cancelled":
                self.cancelled = True


class Succeeded(msgspec.Struct, frozen=True):
    """The run returned a valid output."""

    output: Any


class Failed(msgspec.Struct, frozen=True):
    """The attempt failed."""

    failure: Failure
    exit_code: int | None = None


class Cancelled(msgspec.Struct, frozen=True):
    """Everything of the run is gone, as requested."""


class Lost(msgspec.Struct, frozen=True):
    """The machine went away under the run: nobody's fault, it is dispatched again."""

    reason: str


Outcome = Succeeded | Failed | Cancelled | Lost

_ERROR_CODES: frozenset[str] = frozenset(
    {"task_error", "task_exit", "output_invalid", "output_too_large", "nondeterminism"}
)


def judge(said: Said, exited: Exited, *, cancel_requested: bool, max_duration: float, schema: Any) -> Outcome:
    """The outcome of an attempt."""
    finished = said.returned and exited.exit_code == 0
    if exited.cause == "lost":
        return Lost(exited.detail or "the workspace's machine was lost")
    if cancel_requested and not (finished and exited.cause == "exit"):
        return Cancelled()
    if exited.cause == "deadline":
        return _failed("max_duration", f"ran longer than {max_duration:g} s", exited, {"limit_seconds": max_duration})
    if finished:
        return _check_output(said.output, schema)
    if exited.oom:
        return _failed(
            "out_of_memory", "the workspace's memory limit was reached and the kernel ended the task", exited
        )
    if said.error is not None:
        return _from_error(said.error, exited)
    return _failed("task_exit", _describe_exit(exited), exited, {"detail": exited.detail} if exited.detail else {})


def _failed(code: FailureCode, message: str, exited: Exited, detail: dict[str, Any] | None = None) -> Failed:
    facts = {"exit_code": exited.exit_code, "signal": exited.signal, **(detail or {})}
    known = {key: value for key, value in facts.items() if value is not None}
    return Failed(Failure(code=code, message=message, detail=known), exit_code=exited.exit_code)


def _from_error(error: dict[str, Any], exited: Exited) -> Failed:
    code: FailureCode = error["code"] if error.get("code") in _ERROR_CODES else "task_error"
    kept = ("type", "traceback", "path", "exit_code", "where", "hint")
    detail = {key: error[key] for key in kept if error.get(key) is not None}
    return _failed(code, str(error.get("message", "the task failed")), exited, detail)


def _describe_exit(exited: Exited) -> str:
    if exited.signal is not None:
        try:
            name = signal.Signals(exited.signal).name
        except ValueError:
            name = f"signal {exited.signal}"
        return f"the task's process was ended by {name}"
    if exited.exit_code is None:
        return f"the task could not be started: {exited.detail}"
    return f"the task's process exited with code {exited.exit_code} before the task returned"


def _check_output(output: Any, schema: Any) -> Outcome:
    size = len(msgspec.json.encode(output))
    if size > MAX_OUTPUT:
        message = f"the task returned {size} bytes of JSON; the limit is {MAX_OUTPUT}: write a file instead"
        return Failed(Failure(code="output_too_large", message=message), exit_code=0)
    if schema is not None:
        error = best_match(_validator(msgspec.json.encode(schema)).iter_errors(output))
        if error is not None:
            where = error.json_path if error.json_path != "$" else "the output"
            message = f"the output does not fit the task's return type: {where}: {error.message[:500]}"
            return Failed(
                Failure(code="output_invalid", message=message, detail={"path": error.json_path}), exit_code=0
            )
    return Succeeded(output)


@lru_cache(maxsize=512)
def _validator(schema: bytes) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(msgspec.json.decode(schema))
