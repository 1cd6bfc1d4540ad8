"""How a run ends, judged from what its process said and how it exited: a pure function, so that every case can be tested."""

from __future__ import annotations

import json
import signal
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.exceptions import best_match

from helmr.errors import HelmrError, ImageError
from helmr.events import MAX_VALUE, Failure, FailureCode
from worker.engine import Exited
from worker.host import is_full
from worker.masking import Masker
from worker.messages import Broken, Error, Result, ResultPart
from worker.run_secrets import SecretMissing

#: Characters of JSON that the pieces of an output may have: what the authoring API lets through.
MAX_PARTS = MAX_VALUE
#: Characters of what a failure carries.
_MAX_MESSAGE, _MAX_TRACEBACK = 16 * 1024, 60 * 1024


class Said:
    """What the task said about its end, gathered while it ran."""

    def __init__(self) -> None:
        self.output: Any = None
        self.returned = False
        self.error: Error | None = None
        #: How the task broke the protocol; nothing it says counts any more.
        self.broken: str | None = None
        #: Whether the output came in pieces, because it is large.
        self.in_parts = False
        self._parts: list[str] = []
        self._size = 0

    def hear(self, message: Result | ResultPart | Error) -> None:
        """Take note of one message.

        Raises:
            Broken: the pieces of an output make no JSON, or are too many.
        """
        match message:
            case ResultPart(data=data):
                self._size += len(data)
                if self._size > MAX_PARTS:
                    raise Broken(f"the task sent an output of more than {MAX_PARTS >> 20} MiB")
                self._parts.append(data)
            case Result():
                self.returned = True
                self.in_parts = message.parts is not None
                self.output = message.output if message.parts is None else self._join()
            case Error():
                self.error = message

    def _join(self) -> Any:
        try:
            return json.loads("".join(self._parts))
        except (ValueError, RecursionError) as error:
            raise Broken(f"the pieces of the task's output make no JSON: {error}") from error


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
    """The machine went away under the run: nobody's fault, it is dispatched again.

    ``orderly``: it was never to be executed here, which says nothing about the run, and is not counted.
    """

    reason: str
    orderly: bool = False


class Waits(msgspec.Struct, frozen=True):
    """The run waits, and has no lease any more."""


Outcome = Succeeded | Failed | Cancelled | Lost | Waits

#: What a task may call its own failure.
_ERROR_CODES: tuple[FailureCode, ...] = (
    "task_error",
    "task_exit",
    "output_invalid",
    "output_too_large",
    "nondeterminism",
)


def loss(exited: Exited, *, asked: bool) -> str | None:
    """How a process came to its end without anybody's fault, or None; ``asked``: this worker had it ended.

    Whoever else ends it ends the machine: another worker of this home, say, that took this one for dead.
    """
    if exited.cause == "lost":
        return exited.detail or "the supervisor ended"
    if exited.cause == "cancel" and not asked:
        return "somebody else ended its processes"
    return None


def judge(
    said: Said, exited: Exited, *, cancel_requested: bool, max_duration: float, memory: int | None, schema: Any
) -> Outcome:
    """The outcome of an attempt; ``memory``: the workspace's limit in bytes, if there is one."""
    finished = said.returned and exited.exit_code == 0
    if exited.cause == "lost" or (exited.cause == "unknown" and not exited.oom):
        return Lost(exited.detail or "the workspace's machine was lost")
    if cancel_requested and not (finished and exited.cause == "exit"):
        return Cancelled()
    if said.broken is not None:
        return _failed("task_error", said.broken, exited)
    if exited.cause == "deadline":
        return _failed("max_duration", f"ran longer than {max_duration:g} s", exited, {"limit_seconds": max_duration})
    if finished:
        return _check_output(said.output, schema)
    if exited.oom:
        return _out_of_memory(exited, memory)
    if said.error is not None:
        return _from_error(said.error, exited)
    return _failed("task_exit", _describe_exit(exited), exited, {"detail": exited.detail} if exited.detail else {})


def masked(outcome: Outcome, masker: Masker) -> Outcome:
    """The outcome without the values of secrets."""
    match outcome:
        case Succeeded(output=output):
            return Succeeded(masker.json(output))
        case Failed(failure=failure, exit_code=code):
            detail = masker.json(failure.detail)
            message = masker.text(failure.message)
            return Failed(msgspec.structs.replace(failure, message=message, detail=detail), exit_code=code)
        case _:
            return outcome


def _failed(code: FailureCode, message: str, exited: Exited, detail: dict[str, Any] | None = None) -> Failed:
    facts = {"exit_code": exited.exit_code, "signal": exited.signal, **(detail or {})}
    known = {key: value for key, value in facts.items() if value is not None}
    return Failed(Failure(code=code, message=message, detail=known), exit_code=exited.exit_code)


def _out_of_memory(exited: Exited, limit: int | None) -> Failed:
    known = f" of {limit / 1024**2:g} MiB" if limit else ""
    message = f"the workspace's memory limit{known} was reached, and the kernel ended a process of the task"
    return _failed("out_of_memory", message, exited, {"limit_bytes": limit})


def _from_error(error: Error, exited: Exited) -> Failed:
    code: FailureCode = "task_error"
    for known in _ERROR_CODES:
        if error.code == known:
            code = known
    detail = {"type": error.type, "path": error.path, "where": error.where, "hint": error.hint}
    short = {key: value[:_MAX_MESSAGE] for key, value in detail.items() if value is not None}
    trace = {"traceback": error.traceback[:_MAX_TRACEBACK]} if error.traceback is not None else {}
    left = {"exit_code": error.exit_code} if error.exit_code is not None else {}
    return _failed(code, error.message[:_MAX_MESSAGE], exited, {**short, **trace, **left})


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
    if size > MAX_VALUE:
        message = f"the task returned {size} bytes of JSON; the limit is {MAX_VALUE}: write a file instead"
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


def overfull_disk(used: int, limit: int) -> Failed:
    """The failure of a run whose workspace took more of the disk than its sandbox allows (both in bytes)."""
    message = f"the workspace's files take {used >> 20} MiB of the disk; its sandbox allows {limit >> 20} MiB"
    hint = "remove some with `helmr workspace exec`, or raise disk= of the sandbox; what is read again belongs in /tmp"
    return Failed(Failure(code="disk_full", message=message, detail={"used": used, "limit": limit, "hint": hint}))


def prevented(error: HelmrError | OSError) -> Failed:
    """The failure of a run that could not be prepared, or not be gone on with, for a reason of its surroundings.

    Raises:
        OSError: the error itself, if it does not say that a disk is full: then it is a fault of ours.
    """
    if isinstance(error, OSError):
        if not is_full(error):
            raise error
        message = f"no space is left for the run's files on the worker's machine: {error}"
        return Failed(Failure(code="disk_full", message=message))
    code: FailureCode = "disk_full" if is_full(error) else "workspace_error"
    if isinstance(error, ImageError):
        code = "image_error"
    elif isinstance(error, SecretMissing):
        code = "secret_missing"
    return Failed(Failure(code=code, message=error.message, detail={**error.details, "hint": error.hint}))
