"""How a task that did not return is told of: every other way to end, as one control message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from helmr.context import Cancelled
from helmr.errors import HelmrError, Nondeterminism

#: Limits of what a failure carries, in characters.
MESSAGE_LIMIT = 16 * 1024
TRACEBACK_LIMIT = 60 * 1024

_OWN = str(Path(__file__).absolute().parents[1]) + os.sep
_LIBRARY = (f"{os.sep}asyncio{os.sep}", f"{os.sep}importlib{os.sep}", "<frozen ")


class OutputRefused(Exception):
    """What the function returned cannot be the output of a run; ``code`` is the failure code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModuleBroken(Exception):
    """The task's module could not be imported; the reason is its ``__cause__``."""


def describe(failure: BaseException, *, source_path: str, cancelled: bool) -> tuple[dict[str, Any], int]:
    """The control message for a failure, and the exit code of the process.

    Args:
        source_path: the folder of the task project; places in it are given relative to it.
        cancelled: whether the run was asked to stop.
    """
    if cancelled and _comes_from_cancelling(failure):
        return {"op": "cancelled"}, 143
    if isinstance(failure, SystemExit):
        return _exit(failure)
    if isinstance(failure, OutputRefused):
        return {"op": "error", "code": failure.code, "type": "OutputRefused", "message": str(failure)}, 1
    return _error(failure, source_path), 1


def _comes_from_cancelling(failure: BaseException) -> bool:
    # Also an error raised while cleaning up: it has the cancellation as its context.
    asyncio = sys.modules.get("asyncio")
    kinds = (Cancelled,) if asyncio is None else (Cancelled, asyncio.CancelledError)
    link: BaseException | None = failure
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        if isinstance(link, kinds):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def _exit(request: SystemExit) -> tuple[dict[str, Any], int]:
    code = request.code if isinstance(request.code, int) else 0 if request.code is None else 1
    said = f": {_text(request)}" if code == 1 and not isinstance(request.code, int) else ""
    message = f"the task called sys.exit({code}) instead of returning{said}"
    return {"op": "error", "code": "task_exit", "message": _cut(message, MESSAGE_LIMIT), "exit_code": code}, code & 0xFF


def _error(failure: BaseException, source_path: str) -> dict[str, Any]:
    shown = failure.__cause__ if isinstance(failure, ModuleBroken) and failure.__cause__ else failure
    trace = _trimmed(shown.__traceback__)
    where = place_of(shown, source_path)
    message = _text(shown)
    if shown is not failure:
        message = f"{failure}: {type(shown).__name__}: {message}" + (f" ({where})" if where else "")
    told = {
        "op": "error",
        "code": "nondeterminism" if isinstance(shown, Nondeterminism) else "task_error",
        "type": type(shown).__qualname__,
        "message": _cut(message, MESSAGE_LIMIT),
        "traceback": _cut("".join(traceback.format_exception(type(shown), shown, trace)), TRACEBACK_LIMIT),
    }
    if where:
        told["where"] = where
    if isinstance(shown, HelmrError) and shown.hint:
        told["hint"] = shown.hint
    return told


def _text(failure: BaseException) -> str:
    try:
        return str(failure)
    except Exception as broken:  # noqa: BLE001  a __str__ that raises must not hide the failure it describes
        return f"(its __str__ raised {type(broken).__name__})"


def _cut(text: str, limit: int) -> str:
    """The beginning and, mostly, the end: that is where a traceback says what happened."""
    if len(text) <= limit:
        return text
    head = limit // 4
    return f"{text[:head]}\n… [{len(text) - limit:,} characters left out] …\n{text[head - limit :]}"


def _trimmed(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the author's first frame on; whole if there is none."""
    first = trace
    while first is not None:
        name = first.tb_frame.f_code.co_filename
        if not name.startswith(_OWN) and not any(part in name for part in _LIBRARY):
            return first
        first = first.tb_next
    return None


def place_of(failure: BaseException, source_path: str) -> str | None:
    """``file:line`` of the last line of the project that was being executed, or that could not be parsed."""
    root = str(Path(source_path).absolute()) + os.sep
    frames = traceback.extract_tb(_trimmed(failure.__traceback__))
    places = [(frame.filename, frame.lineno) for frame in frames]
    if isinstance(failure, SyntaxError) and failure.filename:
        places.append((failure.filename, failure.lineno))
    own = [place for place in places if place[0].startswith(root)] or places
    if not own:
        return None
    file, line = own[-1]
    return f"{file.removeprefix(root)}:{line}"
