"""Structured log lines of a run: ``logger.info("parsed", files=3)``.

Outside of a run the same calls go to the standard :mod:`logging`, logger ``helmr.task``, so that tasks can be tried anywhere.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any

from helmr import jsonform, runtime
from helmr.jsonform import ConversionError, shown, to_builtins

#: One log line, its fields included, in bytes of UTF-8.
LINE_LIMIT = 64 * 1024
TRUNCATED = " … [truncated]"

_fallback = logging.getLogger("helmr.task")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
#: What every record has; anything else on it was given with ``extra=``.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def debug(message: object, /, **fields: Any) -> None:
    """Log for whoever is hunting a bug."""
    _log("debug", message, fields)


def info(message: object, /, **fields: Any) -> None:
    """Log what the task is doing; ``fields`` are kept as JSON."""
    _log("info", message, fields)


def warning(message: object, /, **fields: Any) -> None:
    """Log something that somebody should look at some time."""
    _log("warning", message, fields)


def error(message: object, /, **fields: Any) -> None:
    """Log a failure."""
    _log("error", message, fields)


def exception(message: object, /, **fields: Any) -> None:
    """Log a failure with the traceback of the exception being handled, in the field ``exception``."""
    failure = sys.exc_info()[1]
    if failure is not None:
        fields.setdefault("exception", "".join(traceback.format_exception(failure)).rstrip())
    _log("error", message, fields)


def _log(level: str, message: object, fields: dict[str, Any]) -> None:
    run = runtime.current()
    if run is None:
        _log_outside(level, message, fields)
    elif not run.replaying:  # what is said again was heard the first time
        run.send(_line(level, str(message), fields))


def _line(level: str, message: str, fields: dict[str, Any]) -> dict[str, Any]:
    text = _bounded(message, LINE_LIMIT)
    kept = {name: _field(value) for name, value in fields.items()}
    room = LINE_LIMIT - len(jsonform.encode(text))
    if kept and len(jsonform.encode(kept)) > room:
        kept = _shortened(kept, room)
    return {"op": "log", "level": level, "message": text, "fields": kept, "at": runtime.timestamp()}


def _bounded(text: str, limit: int) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text
    return data[: max(0, limit - len(TRUNCATED.encode()))].decode("utf-8", "ignore") + TRUNCATED


def _field(value: Any) -> Any:
    # A log line must never be what fails a task: what is not JSON is shown as Python shows it.
    try:
        return to_builtins(value)
    except ConversionError:
        return shown(value, LINE_LIMIT)


def _shortened(fields: dict[str, Any], room: int) -> dict[str, Any]:
    """As many fields as fit, in order; the first that does not is cut."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        size = len(jsonform.encode({name: value}))
        if size > room:
            text = value if isinstance(value, str) else jsonform.dumps(value)
            if room > 256:
                kept[name] = _bounded(text, (room - len(name.encode("utf-8", "replace"))) // 2)
            break
        kept[name] = value
        room -= size
    return kept


def _log_outside(level: str, message: object, fields: dict[str, Any]) -> None:
    if not _fallback.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        _fallback.addHandler(handler)
        _fallback.setLevel(logging.DEBUG)
    shown = " ".join(f"{name}={value!r}" for name, value in fields.items())
    _fallback.log(_LEVELS[level], "%s", f"{message} {shown}" if shown else message, stacklevel=3)


class Handler(logging.Handler):
    """Carries records of the standard :mod:`logging` the same way; the runner puts it on the root logger."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; failures to format it are reported as :meth:`logging.Handler.handleError` does."""
        run = runtime.current()
        if run is None:
            sys.stderr.write(f"{record.levelname} {record.getMessage()}\n")
            return
        if run.replaying:
            return
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  a wrong %-format must not fail the task; logging has a rule for it
            self.handleError(record)
            return
        run.send(_line(record.levelname.lower(), message, self._fields(record)))

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        fields["logger"] = record.name
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        return fields
