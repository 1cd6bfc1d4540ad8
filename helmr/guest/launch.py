"""The last steps before a task's own code: session, user, files, environment; then call the runner, or execute a program.

All of it happens in the forked child. What the child is to do, secrets included, arrives over its control socket and nowhere
else, so that the zygote, whose memory every later process inherits, never sees it.
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

from helmr.guest import protocol, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_NOT_FOUND = 127
_NOT_EXECUTABLE = 126


class Files:
    """The descriptors of a task: its control socket and the write ends of its two pipes."""

    def __init__(self, control: int, stdout: int, stderr: int) -> None:
        self.control = control
        self.stdout = stdout
        self.stderr = stderr

    def close(self) -> None:
        for fd in (self.control, self.stdout, self.stderr):
            os.close(fd)


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


def main(files: Files, complain: int, settings: Settings) -> NoReturn:
    """Become the process that the worker asked for; the reason why that fails goes to ``complain``."""
    code = 1
    try:
        control = socket.socket(fileno=files.control)
        _take_place(files)
        order = _receive(control)
        _prefer_as_victim()
        _give_up_rights(settings)
        _enter(order, settings)
        if order.get("kind") == "argv":
            _execute(order["argv"])
        task = _task(order, settings)
        os.close(complain)
        code = _call(settings.runner, task, control)
    except Refusal as refusal:
        os.write(complain, str(refusal).encode()[:4096])
        code = refusal.code
    except BaseException:  # noqa: BLE001  (whatever it is, the forked child must not return into the zygote)
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


def _take_place(files: Files) -> None:
    """Own session, the task's descriptors as 0, 1 and 2."""
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((nothing, 0), (files.stdout, 1), (files.stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    # Line by line, as on a terminal: print() must arrive while the task runs.
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
        tree.stay_readable()


def _prefer_as_victim() -> None:
    """When memory runs out, the kernel is to end a task rather than the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    except (FileNotFoundError, PermissionError):
        return


def _receive(control: socket.socket) -> dict[str, Any]:
    """The first message: the ProcessSpec."""
    (length,) = protocol.LENGTH.unpack(_exactly(control, protocol.LENGTH.size))
    order: dict[str, Any] = json.loads(_exactly(control, length))
    return order


def _exactly(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            os._exit(0)  # a spare process that was not needed
        data += piece
    return bytes(data)


def _enter(order: dict[str, Any], settings: Settings) -> None:
    """Environment and working folder, as the user that the process runs as."""
    os.environ.update(order.get("env") or {})
    os.environ.update(order.get("secrets") or {})
    folder = order.get("cwd") or settings.workspace
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


def _task(order: dict[str, Any], settings: Settings) -> dict[str, Any]:
    task = dict(order.get("task") or {})
    name = order.get("source")
    if name is not None:
        path = os.path.join(settings.sources or "", name)
        if settings.sources is None or not os.path.isdir(path):
            raise Refusal(f"the source tree {name!r} has not been delivered to this machine", 1)
        task["source_path"] = path
    return task


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
