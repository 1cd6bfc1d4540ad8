"""Helmr: a self-hosted runtime for coding agents.

What task projects and programs import. Names are loaded when first used, so that ``import helmr`` costs a millisecond and
needs the standard library alone: it also runs inside containers.

``logger``, ``metadata``, ``streams``, ``timers`` and ``tokens`` are modules whose functions act on the run they are called in.
"""

from __future__ import annotations

from helmr.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; typing itself would cost several milliseconds
if TYPE_CHECKING:
    from typing import Any

    from helmr import logger, metadata, streams, timers, tokens
    from helmr.client import AsyncClient as AsyncClient
    from helmr.client import Client as Client
    from helmr.context import Cancelled, TaskContext
    from helmr.declarations import Queue, Retry, Secret
    from helmr.errors import (
        ConcurrentWait,
        ConfigError,
        Conflict,
        EngineUnavailable,
        HelmrError,
        ImageError,
        Nondeterminism,
        NotAllowed,
        NotFound,
        PayloadInvalid,
        ProjectError,
        RunFailed,
        StepFailed,
        TimedOut,
        TooLarge,
        Unavailable,
        UsageError,
        WaitCancelled,
        WaitTimeout,
    )
    from helmr.sandbox import Image, Sandbox
    from helmr.steps import now as now
    from helmr.steps import random as random
    from helmr.steps import step, step_async
    from helmr.steps import uuid4 as uuid4
    from helmr.tasks import Task, task

#: Without the clients: a task that imports everything by star must not need what they need. And without ``now``, ``random`` and
#: ``uuid4``, which would take the place of others of that name.
__all__ = [
    "Cancelled",
    "ConcurrentWait",
    "ConfigError",
    "Conflict",
    "EngineUnavailable",
    "HelmrError",
    "Image",
    "ImageError",
    "Nondeterminism",
    "NotAllowed",
    "NotFound",
    "PayloadInvalid",
    "ProjectError",
    "Queue",
    "Retry",
    "RunFailed",
    "Sandbox",
    "Secret",
    "StepFailed",
    "Task",
    "TaskContext",
    "TimedOut",
    "TooLarge",
    "Unavailable",
    "UsageError",
    "WaitCancelled",
    "WaitTimeout",
    "__version__",
    "logger",
    "metadata",
    "step",
    "step_async",
    "streams",
    "task",
    "timers",
    "tokens",
]

_MODULES = ("logger", "metadata", "streams", "timers", "tokens")
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
    "now": "steps",
    "random": "steps",
    "step": "steps",
    "step_async": "steps",
    "task": "tasks",
    "uuid4": "steps",
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
