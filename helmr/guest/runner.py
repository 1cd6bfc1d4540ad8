"""Calls one task in the process made for it, and tells the supervisor how that went.

The process is forked, with the workspace as working folder, stdout and stderr as pipes, and a socket for everything that is
not output of the program: what the task logs, what it returns, how it fails. Results never travel on stdout.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import io
import logging
import os
import socket
import stat
import sys
from collections.abc import Coroutine
from typing import Any

from helmr import jsonform, logger, metadata, registry, runtime, steps, streams, timers, tokens
from helmr.context import TaskContext
from helmr.convert import from_builtins
from helmr.errors import PayloadInvalid, ProjectError
from helmr.guest.failures import ModuleBroken, OutputRefused, describe
from helmr.guest.interruption import Interruption
from helmr.guest.outbox import Outbox, open_streams
from helmr.jsonform import ConversionError
from helmr.tasks import Task

#: An output, in bytes of JSON; more than 512 KiB of it are stored as an artifact.
OUTPUT_LIMIT = 16 * 1024 * 1024
#: What asyncio tasks that outlive their parent may take to clean up, in seconds.
LEFTOVER_GRACE = 1.0

#: Imported here so that the fork server has them before it forks.
PRELOADED = (metadata, steps, streams, timers, tokens)
#: Modules that could not be imported ahead, and why; a template knows, and the runs that are forked from it tell.
_missed: dict[str, str] = {}


def main(task: dict[str, Any], sock: socket.socket) -> int:
    """Run a task to its end and return the exit code of the process; the caller then ends it, whatever threads are left.

    ``task`` has ``source_path`` (folder to import from), ``module``, ``modules`` (others that may define it), ``task_id``,
    ``payload`` (JSON value), ``ctx`` (``run, session, task, workspace, attempt, turn``). On ``sock`` go messages of
    :mod:`helmr.guest.protocol`, each a JSON object with ``op``:

    ============= ============================================================================================
    started       the function is about to be called
    log           ``level, message, fields, at``
    metadata      ``metadata`` (the whole new document), ``changed`` (keys), ``n`` (changes so far that a replay repeats)
    output        ``stream, data`` and perhaps ``correlation_id``; ``n, main``: see below
    step          ``id, name, n, main, call`` and ``result`` or ``error``: a step is over, and to be recorded
    wait          ``id, name, n, main, kind`` and what is waited for: ``stream, token, correlation_id, timeout, due``
    peek          ``id, name, n, main, stream`` and perhaps ``correlation_id``
    token         ``id, name, n, main, timeout, tags, metadata``: make one
    secret        ``id, token``: make a secret for it
    result_part   ``data``: a piece of a long output's JSON text
    result        ``output``, or ``parts``: how many pieces to join and parse. The last message
    error         ``code`` (a failure code), ``message``, and for ``task_error`` ``type, traceback, where, hint``; for
                  ``task_exit`` ``exit_code``. The last message
    cancelled     the function ended because it was asked to. The last message
    ============= ============================================================================================

    What has an ``id`` is answered with it (``op`` ``answer``). ``name``, ``n`` and ``main`` are the key of a durable call;
    what is recorded of earlier ones comes with ``task``: ``journal`` (entries as :class:`helmr.replay.Journal` takes them),
    ``metadata`` (the document the run began with) and ``metadata_calls``.
    """
    own = os.getpid()
    interruption = Interruption()
    outbox = Outbox(sock, interruption)
    code = 0
    try:
        interruption.install()
        output, text = _attempt(task, outbox, interruption)
        interruption.finish()
    except BaseException as failure:  # noqa: BLE001  whatever ended the task, it has to be told
        interruption.finish()
        _leave_if_forked(own, failure)
        message, code = describe(failure, source_path=task["source_path"], cancelled=interruption.requested)
        _flush()
        outbox.send(message)
    else:
        _leave_if_forked(own, None)
        _flush()
        outbox.send_result(output, text)
    os.sched_yield()
    return code


def _leave_if_forked(own: int, failure: BaseException | None) -> None:
    """A child that the task forked and that returned up to here must not speak for its parent."""
    if os.getpid() == own:
        return
    code = 0 if failure is None else 1
    if isinstance(failure, SystemExit):
        code = failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    elif failure is not None:
        sys.excepthook(type(failure), failure, failure.__traceback__)
    _flush()
    os._exit(code & 0xFF)


def _attempt(spec: dict[str, Any], outbox: Outbox, interruption: Interruption) -> tuple[Any, str]:
    """The output as JSON builtins and as JSON text."""
    facts: dict[str, Any] = spec.get("ctx") or {}
    # Only here it is known: the engine decides where the workspace is, and starts us in it.
    facts = facts | {"workspace": {"path": os.getcwd(), **facts.get("workspace", {})}}
    run = runtime.Runtime(
        outbox.send,
        spec.get("metadata", facts.get("run", {}).get("metadata")),
        entries=spec.get("journal", ()),
        metadata_calls=spec.get("metadata_calls", 0),
        ask=outbox.ask,
    )
    context = TaskContext(facts, lambda: interruption.requested, lambda: run.replaying)
    _set_up(spec["source_path"])
    outbox.order_streams(lambda: run.replaying)
    runtime.install(run)
    for name, reason in _missed.items():
        logger.warning(f"{name} could not be imported ahead: {reason}", source="helmr", preload=name)
    task = _load(spec)
    arguments = task.arguments(_payload(task, spec.get("payload")), context)
    outbox.send({"op": "started"})
    try:
        result = task.fn(*arguments.args, **arguments.kwargs)
        if inspect.iscoroutine(result):
            result = _await(run, result, interruption)
    except Exception:
        if run.broken is not None:  # whatever the task made of it
            raise run.broken from None
        raise
    run.finish()
    return _output(task, result)


def preload(source_path: str, modules: list[str]) -> None:
    """Import modules in a template, ahead of :func:`prepare`. That one of them cannot be imported is told by the runs."""
    _set_up(source_path)
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as failure:  # noqa: BLE001  (the runs go on without it, and say so)
            _missed[name] = f"{type(failure).__name__}: {failure}"


def prepare(source_path: str, module: str) -> None:
    """Do, in a template, what is the same for every run of a module's tasks, which are forked from it; without one: of any.

    Raises:
        Exception: whatever the module raises.
    """
    _set_up(source_path)
    if module:
        importlib.import_module(module)
    if any(inspect.iscoroutinefunction(task.fn) for task in registry.tasks.values()):
        importlib.import_module("asyncio")
    rehearse()


def rehearse() -> None:
    """Do once what every run does around its function.

    In a template: what Python writes only the first time need not be written, and copied, by each run: a tenth of the page
    faults of a run, which are most of what it costs. In a forked process that waits for its order: the pages that it will
    write to are its own by then, which takes half a millisecond from the way to the function.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox = Outbox(theirs, Interruption())
        run = runtime.Runtime(outbox.send, {}, ask=outbox.ask)
        outbox.order_streams(lambda: run.replaying)
        context = TaskContext({"run": {}}, lambda: False, lambda: run.replaying)
        for task in list(registry.tasks.values())[:1]:
            task.arguments(from_builtins(None, Any), context)
        outbox.send({"op": "started"})
        sys.stdout.write("")
        run.finish()
        output = jsonform.to_builtins(from_builtins(None, Any))
        _flush()
        outbox.send_result(output, jsonform.dumps(output))
    outbox.leave_streams()


def _set_up(source_path: str) -> None:
    """Make the process one that tasks can be imported into; doing it twice is fine."""
    if source_path in sys.path:
        return
    open_streams()
    root = logging.getLogger()
    root.addHandler(logger.Handler())
    root.setLevel(logging.INFO)
    sys.path.insert(0, source_path)


def _load(spec: dict[str, Any]) -> Task[Any, Any]:
    """Import the task's module; if that does not define it, the others of the project."""
    for module in dict.fromkeys((spec["module"], *spec.get("modules", ()))):
        try:
            importlib.import_module(module)
        except Exception as failure:
            raise ModuleBroken(f"cannot import the module {module!r}") from failure
        if spec["task_id"] in registry.tasks:
            return registry.tasks[spec["task_id"]]
    known = ", ".join(sorted(registry.tasks)) or "none"
    raise ProjectError(
        f"module {spec['module']!r} defines no task {spec['task_id']!r}",
        hint=f"tasks found: {known}; is the task defined only under some condition that does not hold here?",
    )


def _payload(task: Task[Any, Any], value: Any) -> Any:
    if "payload" not in task.parameters:
        return None
    try:
        return from_builtins(value, task.payload_type)
    except ConversionError as failure:
        if value is None and task.payload_optional:
            return task.payload_default
        raise PayloadInvalid(f"the payload does not fit the task {task.id!r}: {failure}") from None


def _await(run: runtime.Runtime, result: Coroutine[Any, Any, Any], interruption: Interruption) -> Any:
    import asyncio

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    run.main_task = main = loop.create_task(result)
    # A signal handler runs between any two instructions of the loop: only this call is safe there, and it wakes the loop.
    interruption.redirect = lambda: loop.call_soon_threadsafe(main.cancel)
    try:
        return loop.run_until_complete(main)
    finally:
        interruption.finish()
        leftovers = asyncio.all_tasks(loop)
        for each in leftovers:
            each.cancel()
        if leftovers:
            loop.run_until_complete(asyncio.wait(leftovers, timeout=LEFTOVER_GRACE))


def _output(task: Task[Any, Any], value: Any) -> tuple[Any, str]:
    try:
        output = jsonform.to_builtins(value)
    except ConversionError as failure:
        raise OutputRefused("output_invalid", f"the task returned what is not JSON: {failure}") from None
    # A pydantic model has checked itself, and need not accept its own dump.
    if task.return_type is not Any and not jsonform.is_pydantic(type(value)):
        try:
            from_builtins(output, task.return_type)
        except ConversionError as failure:
            raise OutputRefused("output_invalid", f"the task did not return what it declares: {failure}") from None
    text = jsonform.dumps(output)
    size = len(text.encode("utf-8", "replace"))
    if size > OUTPUT_LIMIT:
        raise OutputRefused(
            "output_too_large",
            f"the task returned {size:,} bytes of JSON, more than {OUTPUT_LIMIT >> 20} MiB; write it to the workspace",
        )
    return output, text


def _flush() -> None:
    """Everything written so far must be in the pipes, and in the files, before the process is ended without ceremony."""
    for file in _open_files():
        try:
            file.flush()
        except (OSError, ValueError):  # a pipe nobody reads, a file closed meanwhile: nothing is left to be saved
            continue


def _open_files() -> list[Any]:
    files: list[Any] = [file for file in (sys.stdout, sys.stderr) if file is not None]
    if not _writes_files():
        return files
    found = [
        each for each in gc.get_objects() if isinstance(each, io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom)
    ]
    # Text layers first: what they hold goes down into the buffer below.
    return [*files, *sorted(found, key=lambda file: not isinstance(file, io.TextIOWrapper))]


def _writes_files() -> bool:
    """Whether a regular file is open for writing: then, and only then, walking all objects is worth its milliseconds."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except FileNotFoundError:
        return True
    return any(fd > 2 and _is_file(fd) for fd in numbers)


def _is_file(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # the descriptor of the listing itself
        return False
