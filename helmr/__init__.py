"""Helmr: a self-hosted runtime for coding agents.

What task projects and programs import. Names are loaded when first used, so that ``import helmr`` costs a millisecond and
needs the standard library alone: it also runs inside containers.

``logger``, ``metadata`` and ``streams`` are modules whose functions act on the run they are called in.
"""

from __future__ import annotations

from helmr.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; typing itself would cost several milliseconds
if TYPE_CHECKING:
    from typing import Any

    from helmr import logger, metadata, streams
    from helmr.client import AsyncClient as AsyncClient
    from helmr.client import Client as Client
    from helmr.context import Cancelled, TaskContext
    from helmr.declarations import Queue, Retry, Secret
    from helmr.errors import (
        ConfigError,
        Conflict,
        EngineUnavailable,
        HelmrError,
        ImageError,
        NotAllowed,
        NotFound,
        PayloadInvalid,
        ProjectError,
        RunFailed,
        TimedOut,
        TooLarge,
        Unavailable,
        UsageError,
    )
    from helmr.sandbox import Image, Sandbox
    from helmr.tasks import Task, task

#: Without the clients: a task that imports everything by star must not need what they need.
__all__ = [
    "Cancelled",
    "ConfigError",
    "Conflict",
    "EngineUnavailable",
    "HelmrError",
    "Image",
    "ImageError",
    "NotAllowed",
    "NotFound",
    "PayloadInvalid",
    "ProjectError",
    "Queue",
    "Retry",
    "RunFailed",
    "Sandbox",
    "Secret",
    "Task",
    "TaskContext",
    "TimedOut",
    "TooLarge",
    "Unavailable",
    "UsageError",
    "__version__",
    "logger",
    "metadata",
    "streams",
    "task",
]

_MODULES = ("logger", "metadata", "streams")
_HOMES = {
    "AsyncClient": "client",
    "Cancelled": "context",
    "Client": "client",
    "Image": "sandbox",
    "Queue": "declarations",
    "Retry": "declarations",
    "Sandbox": "sandbox",
    "Secret": "declarations",
    "Task": "tasks",
    "TaskContext": "context",
    "task": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _HOMES:
        raise AttributeError(f"module 'helmr' has no attribute {name!r}")
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"helmr.{name}")
    value = getattr(importlib.import_module(f"helmr.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES})
