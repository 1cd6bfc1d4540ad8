"""The last steps before a task's own code: session, user, files, environment; then call the runner, or execute a program.

All of it happens in the forked child. What the child is to do, secrets included, arrives over its control socket and nowhere
else, so that neither zygote nor template, whose memory later processes inherit, ever sees it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback

from helmr.guest import exec_ends, protocol, template, tree
from helmr.guest.files import Files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126


class Settings:
    """What is the same for every process of this machine."""

    def __init__(self, workspace: str, sources: str | None, uid: int | None, gid: int | None, runner: str) -> None:
        self.workspace = workspace
        self.sources = sources
        self.uid = uid
        self.gid = gid
        self.runner = runner


class Refusal(Exception):
    """The process cannot be started as asked; ``code`` becomes its exit code."""

    def __init__(self, message: str, code: int = _NOT_FOUND) -> None:
        super().__init__(message)
        self.code = code


def main(given: Files, connection: socket.socket, settings: Settings, remark: str = "") -> NoReturn:
    """Become the process that the worker asked for; ``connection`` leads to the shim, which hears why that fails.

    ``remark``: what the process begins with on its stderr.
    """
    code = 1
    hatch = template.Hatch(connection)
    try:
        template.take_place(given)
        _open_streams()
        order = _receive(given.control)
        _prefer_as_victim()
        _give_up_rights(settings)
        if "template" in order:
            # Dup'ed, because the template's own output is not the task's.
            given = Files(given.control, os.dup(1), os.dup(2))
            given, said = template.serve(_plan(order["template"], settings), given, hatch, settings)
            _rehearse(settings)
            order = _receive(given.control)
            said.repeat()  # only now: before its order a process is nobody's, and nobody hears it
        if remark:
            sys.stderr.write(f"{remark}\n")
        if settings.uid is not None:
            tree.stay_readable()
        if order.get("kind", "task") != "task":
            exec_ends.take(given.control, order)
        _enter(order, settings)
        if order.get("kind") == "argv":
            _execute(order["argv"])
        if order.get("kind") == "files":
            os._exit(_transfer(order["task"], settings))
        task = _task(order, settings)
        hatch.close()
        code = _call(settings.runner, task, socket.socket(fileno=given.control))
    except Refusal as refusal:
        hatch.complain(str(refusal))
        code = refusal.code
    except BaseException:  # noqa: BLE001  (whatever it is, the forked child must not return into the zygote)
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _rehearse(settings: Settings) -> None:
    """Do what comes, with nothing in it, while there is time."""
    json.loads(b'{"env": {"": []}}')
    _enter({"env": {"HELMR_WORKSPACE": settings.workspace}}, settings)
    importlib.import_module(settings.runner.partition(":")[0]).rehearse()


def _open_streams() -> None:
    """Standard input is empty, output goes line by line, as on a terminal: print() must arrive while the task runs."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for name, fd, errors in (("stdout", 1, "surrogateescape"), ("stderr", 2, "backslashreplace")):
        stream = open(fd, "w", 1, "utf-8", errors, closefd=False)  # noqa: SIM115  (open as long as the process)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _give_up_rights(settings: Settings) -> None:
    """Become the tasks' user; only now, because a process that waits as that user for its order could be tampered with."""
    if settings.uid is not None and settings.gid is not None:
        os.setgroups([])
        os.setresgid(settings.gid, settings.gid, settings.gid)
        os.setresuid(settings.uid, settings.uid, settings.uid)


def _prefer_as_victim() -> None:
    """When memory runs out, the kernel is to end a task rather than the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    except (FileNotFoundError, PermissionError):
        return


def _receive(control: int) -> dict[str, Any]:
    """The next message: what to be a template for, or the ProcessSpec."""
    (length,) = protocol.LENGTH.unpack(_exactly(control, protocol.LENGTH.size))
    order: dict[str, Any] = json.loads(_exactly(control, length))
    return order


def _exactly(control: int, size: int) -> bytes:
    data = os.read(control, size)
    while data and len(data) < size:
        piece = os.read(control, size - len(data))
        if not piece:
            break
        data += piece
    if len(data) < size:
        os._exit(0)  # a spare process that was not needed
    return data


def _enter(order: dict[str, Any], settings: Settings) -> None:
    """Environment and working folder, as the user that the process runs as."""
    for variables in (order.get("env") or {}, order.get("secrets") or {}):
        for name, value in variables.items():
            os.environ[name] = value
    folder = os.path.join(settings.workspace, order.get("cwd") or "")
    try:
        os.chdir(folder)
    except OSError as error:
        raise Refusal(f"cannot enter the working folder {folder}: {error.strerror}") from error


def _execute(argv: list[str]) -> NoReturn:
    # Python ignores these; a program expects the default.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606
    except FileNotFoundError as error:
        raise Refusal(f"cannot execute {argv[0]!r}: no such program") from error
    except OSError as error:
        raise Refusal(f"cannot execute {argv[0]!r}: {error.strerror}", _NOT_EXECUTABLE) from error
    except (ValueError, IndexError) as error:
        raise Refusal(f"cannot execute {argv!r}: {error}", _NOT_EXECUTABLE) from error


def _transfer(task: dict[str, Any], settings: Settings) -> int:
    transfer = importlib.import_module("helmr.guest.transfer")
    code: int = transfer.main(settings.workspace, task)
    return code


def _task(order: dict[str, Any], settings: Settings) -> dict[str, Any]:
    task = dict(order.get("task") or {})
    if order.get("source") is not None:
        task["source_path"] = _source_path(order["source"], settings)
    return task


def _plan(plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return plan | {"source_path": _source_path(plan["source"], settings)}


def _source_path(name: str, settings: Settings) -> str:
    path = os.path.join(settings.sources or "", name)
    if settings.sources is None or not os.path.isdir(path):
        raise Refusal(f"the source tree {name!r} has not been delivered to this machine", 1)
    return path


def resolve(runner: str) -> Callable[[dict[str, Any], socket.socket], int]:
    """The function that ``module:function`` names."""
    module, _, function = runner.partition(":")
    found: Callable[[dict[str, Any], socket.socket], int] = getattr(importlib.import_module(module), function)
    return found


def _call(runner: str, task: dict[str, Any], control: socket.socket) -> int:
    """Call the runner, then do what an interpreter does at its end: exit functions and buffers."""
    gc.enable()
    try:
        code = resolve(runner)(task, control)
    except SystemExit as request:
        code = _exit_code(request)
    except BaseException:  # noqa: BLE001  (the interpreter's own last resort)
        traceback.print_exc()
        code = 1
    try:
        # What libraries registered to be done at the end. Threads are not waited for, no more than processes are: the task
        # has returned. A full interpreter shutdown would cost milliseconds and free nothing.
        getattr(atexit, "_run_exitfuncs")()  # noqa: B009
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  (as above)
        traceback.print_exc()
        code = code or 1
    return code


def _exit_code(request: SystemExit) -> int:
    if request.code is None:
        return 0
    if isinstance(request.code, int):
        return request.code
    print(request.code, file=sys.stderr)  # noqa: T201
    return 1
