"""Imports the modules of a task project and writes down what they declare: the child process of :mod:`helmr.indexing`.

A process of its own, because importing is executing: whatever a module does to the interpreter it is imported into ends with
this process. The result goes to an inherited descriptor; stdout and stderr belong to the modules.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from helmr import registry
from helmr.declarations import Retry, Secret
from helmr.errors import HelmrError, ProjectError
from helmr.guest.failures import place_of
from helmr.index import (
    ImageEntry,
    Index,
    QueueEntry,
    RetryEntry,
    SandboxEntry,
    SecretEntry,
    StreamEntry,
    TaskEntry,
)
from helmr.sandbox import DEFAULT_NAME, Sandbox
from helmr.schema import json_schema
from helmr.streams import InputStream, OutputStream
from helmr.tasks import Task


def main(arguments: Sequence[str]) -> None:
    """Index a project; ``arguments``: result descriptor, root, modules. The result: ``{"index": …}`` or ``{"error": …}``."""
    descriptor, root, *modules = arguments
    os.set_inheritable(int(descriptor), False)
    try:
        result: dict[str, Any] = {"index": build(Path(root), modules)}
    except HelmrError as failure:
        result = {"error": _relative(failure, root)}
    with open(int(descriptor), "wb") as out:  # noqa: PTH123  a descriptor has no path
        out.write(msgspec.json.encode(result))


def build(root: Path, modules: Sequence[str]) -> Index:
    """Import the modules and collect what was declared.

    Raises:
        ProjectError: a module is missing or broken, a declaration contradicts another, or there is no task.
    """
    sys.path.insert(0, str(root))
    for name in [name for entry in modules for name in module_names(root, entry)]:
        _import(name, root)
    if not registry.tasks:
        raise ProjectError(
            f"no task found in {', '.join(modules)}",
            hint="decorate a function with @helmr.task, or name the modules that define tasks in helmr.toml: modules = […]",
        )
    tasks = [_task_entry(each, root) for each in registry.tasks.values()]
    sandboxes = dict(registry.sandboxes)
    if DEFAULT_NAME not in sandboxes and any(each.sandbox == DEFAULT_NAME for each in tasks):
        sandboxes[DEFAULT_NAME] = Sandbox(DEFAULT_NAME)
    return Index(
        tasks=tuple(sorted(tasks, key=lambda each: each.id)),
        sandboxes=tuple(_sandbox_entry(sandboxes[name]) for name in sorted(sandboxes)),
        queues=tuple(
            QueueEntry(name=name, concurrency=each.concurrency, concurrency_per_key=each.concurrency_per_key)
            for name, each in sorted(registry.queues.items())
        ),
        streams=tuple(_stream_entry(each) for _, each in sorted(registry.streams.items())),
    )


def module_names(root: Path, entry: str) -> Iterator[str]:
    """The importable names of what ``modules`` in ``helmr.toml`` names: a module, or a package or folder and all within.

    Raises:
        ProjectError: there is no such thing in the project.
    """
    dotted = entry.removesuffix(".py").strip("/").replace("/", ".")
    path = root.joinpath(*dotted.split("."))
    if path.with_name(f"{path.name}.py").is_file():
        yield dotted
    elif path.is_dir():
        yield from _names_within(path, dotted)
    else:
        raise _missing(root, entry)


def _names_within(folder: Path, dotted: str) -> Iterator[str]:
    if (folder / "__init__.py").is_file():
        yield dotted
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            yield from _names_within(path, f"{dotted}.{path.name}")
        elif path.suffix == ".py":
            yield f"{dotted}.{path.stem}"


def _missing(root: Path, entry: str) -> ProjectError:
    there = sorted(
        path.stem for path in root.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    )
    close = difflib.get_close_matches(entry, there, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    found = f"found here: {', '.join(there[:10])}" if there else "there is no Python module here"
    return ProjectError(
        f"the project has no module, package or folder {entry!r}",
        hint=f"{hint}name what defines your tasks in helmr.toml: modules = […]; {found}",
    )


def _import(name: str, root: Path) -> None:
    try:
        module = importlib.import_module(name)
    except ProjectError:
        raise
    except (Exception, SystemExit) as failure:
        place = place_of(failure, str(root))
        reason = f"{type(failure).__name__}: {failure}"
        raise ProjectError(
            f"{place + ': ' if place else ''}cannot import the module {name!r}: {reason}", hint=_advice(failure)
        ) from failure
    file = getattr(module, "__file__", None)
    if file is not None and not Path(file).is_relative_to(root):
        raise ProjectError(
            f"the module {name!r} of the project cannot be imported: Python has another of this name, {file}",
            hint="rename yours",
        )


def _advice(failure: BaseException) -> str | None:
    if isinstance(failure, HelmrError):
        return failure.hint
    if isinstance(failure, ModuleNotFoundError):
        package = (failure.name or "").partition(".")[0]
        return f"install {package!r} where you deploy from, too, or import it inside the task's function"
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(failure, KeyError) and trace is not None and trace.tb_frame.f_globals.get("__name__") == "os":
        return "modules are imported when you deploy, without secrets: read os.environ inside the task's function"
    return None


def _relative(failure: HelmrError, root: str) -> dict[str, Any]:
    """The error with paths of the project relative to it: it may be indexed from a temporary copy."""
    told = failure.to_dict()
    prefix = root.rstrip("/") + "/"
    told["message"] = told["message"].replace(prefix, "")
    told["details"] = {"locations": [place.replace(prefix, "") for place in told["details"].get("locations", [])]}
    return told


def _task_entry(task: Task[Any, Any], root: Path) -> TaskEntry:
    file = Path(task.location.file)
    return TaskEntry(
        id=task.id,
        module=task.fn.__module__,
        name=task.fn.__qualname__,
        file=str(file.relative_to(root)) if file.is_relative_to(root) else str(file),
        line=task.location.line,
        doc=next(iter((task.fn.__doc__ or "").strip().splitlines()), ""),
        payload_schema=_payload_schema(task),
        output_schema=_schema(task, "return type", task.return_type),
        sandbox=task.sandbox.name if task.sandbox else DEFAULT_NAME,
        max_duration=task.max_duration,
        ttl=task.ttl,
        retry=_retry_entry(task.retry) if task.retry else None,
        queue=task.queue.name if task.queue else None,
        secrets=tuple(_secret_entry(each) for each in task.secrets),
        park_after=task.park_after,
        cancel_grace=task.cancel_grace,
        on_worker_lost=task.on_worker_lost,
    )


def _payload_schema(task: Task[Any, Any]) -> dict[str, Any] | None:
    if "payload" not in task.parameters:
        return None
    return _schema(task, "payload type", task.payload_type, optional=task.payload_optional)


def _schema(task: Task[Any, Any], what: str, kind: Any, *, optional: bool = False) -> dict[str, Any] | None:
    try:
        return json_schema(kind, mode="validation" if what == "payload type" else "serialization", optional=optional)
    except ProjectError as failure:
        message = f"{task.location}: task {task.id!r}: the {what} {failure.message}"
        raise ProjectError(message, hint=failure.hint) from failure


def _retry_entry(retry: Retry) -> RetryEntry:
    return RetryEntry(
        max_attempts=retry.max_attempts,
        min_delay=retry.min_delay,
        max_delay=retry.max_delay,
        factor=retry.factor,
        jitter=retry.jitter,
        codes=retry.codes,
    )


def _secret_entry(secret: Secret) -> SecretEntry:
    return SecretEntry(name=secret.name, env=secret.env, file=secret.file, mode=secret.mode)


def _sandbox_entry(sandbox: Sandbox) -> SandboxEntry:
    return SandboxEntry(
        name=sandbox.name,
        image=ImageEntry(base=sandbox.image.base, steps=sandbox.image.steps),
        cpu=sandbox.cpu,
        memory=sandbox.memory,
        pids=sandbox.pids,
        disk=sandbox.disk,
        network=sandbox.network,
        mount_path=sandbox.workspace,
        preload=sandbox.preload,
    ).fingerprinted()


def _stream_entry(stream: OutputStream | InputStream) -> StreamEntry:
    try:
        schema = None if stream.schema is None else json_schema(stream.schema)
    except ProjectError as failure:
        message = f"{stream.location}: the schema of the stream {stream.name!r}: {failure.message}"
        raise ProjectError(message, hint=failure.hint) from failure
    return StreamEntry(
        name=stream.name, direction="input" if isinstance(stream, InputStream) else "output", schema=schema
    )
