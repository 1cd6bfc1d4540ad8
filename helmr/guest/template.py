"""A process that has imported the module of a task once, and forks a task from itself for every run of it.

Importing is most of what a short run would cost. What happens at import then happens once for many runs, as in any server
that forks, so a module that cannot stand that must not be treated so: a template that finds its module unfit (the import
fails, asks for what differs from run to run, or leaves threads, children, descriptors or signal handlers behind) gives the
task's descriptors back, and the run starts over in a process of its own.

Before that come the modules that the sandbox wants to have imported ahead (``preload``). Of these, threads of their libraries'
own are put up with (numpy's, say, which come through a fork): whoever names a module vouches for it. Runs with secrets are
forked from templates that have imported nothing but these.

A template runs as the tasks' user and has run user code, so that nobody relies on it: the shim above it kills it when in
doubt. It never sees an order: secrets, payload and environment of a run go to the forked task alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys

from helmr.guest import files, protocol, tree
from helmr.guest.files import Files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, NoReturn

    from helmr.guest.launch import Settings


class PerRun(BaseException):
    """The module wants to know something about the run that imports it."""


class Hatch:
    """The template's end of its connection to the shim."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def tell(self, kind: bytes, number: int, descriptors: list[int] | None = None) -> None:
        files.send(self.connection, protocol.HATCH.pack(kind, number), descriptors or [])

    def complain(self, text: str) -> None:
        """Tell why a process cannot begin; if nobody listens, nobody needs to know."""
        body = text.encode()[: protocol.COMPLAINT_LIMIT]
        try:
            self.connection.sendall(protocol.HATCH.pack(protocol.COMPLAINT, len(body)) + body)
        except OSError:
            return

    def next_request(self) -> Files:
        """The descriptors of the next task; the process ends when the shim is gone."""
        data, descriptors = files.receive(self.connection, protocol.HATCH.size)
        if not data:
            os._exit(0)
        if len(descriptors) != protocol.DESCRIPTORS:
            os._exit(1)  # we are out of descriptors: the shim notices, and starts over
        return Files(*descriptors)

    def close(self) -> None:
        self.connection.close()


def serve(plan: dict[str, Any], given: Files, hatch: Hatch, settings: Settings) -> tuple[Files, Said]:
    """Be a template for ``plan``; returns only in forked tasks, with their descriptors, and what they are to repeat.

    ``plan`` has ``source_path``, ``module`` (may be empty), ``preload`` and ``private`` (names in the environment of runs).
    ``given`` are the descriptors of the first of the tasks, which hears what the import had to say.
    """
    said = Said()
    try:
        _become(plan, settings, said)
    except _Unfit as reason:
        if str(reason):
            hatch.complain(f"helmr: no module is imported ahead: {reason}")
        hatch.tell(protocol.UNFIT, 0, given.numbers())
        os._exit(0)
    tree.hide()
    gc.collect()
    gc.freeze()
    while True:
        pid = _fork(hatch)
        if pid == 0:
            take_place(given)
            return given, said
        given.close()
        said.forget()
        hatch.tell(protocol.FORKED, pid)
        _, status = os.waitpid(pid, 0)
        hatch.tell(protocol.ENDED, status)
        given = hatch.next_request()


def _fork(hatch: Hatch) -> int:
    try:
        return os.fork()
    except OSError as error:
        hatch.complain(f"the process could not be started: {error.strerror}")
        os._exit(1)


def take_place(given: Files) -> None:
    """Own session, the task's descriptors as 1 and 2."""
    os.setsid()
    for source, target in ((given.stdout, 1), (given.stderr, 2)):
        os.dup2(source, target)
        os.close(source)


def _scratch_file() -> BinaryIO:
    """A file without a name, that only who has it open can read."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("helmr"), "w+b")
    # Not at the top: with what it imports it would make every fork dearer.
    import tempfile

    return tempfile.TemporaryFile()


class Said:
    """What the module says while it is imported, kept for the first run: whether that is told twice is not known before."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def keep(self) -> None:
        for fd in (1, 2):
            file = _scratch_file()
            os.dup2(file.fileno(), fd)
            self._kept.append(file)

    def repeat(self) -> None:
        """Say it on the descriptors 1 and 2."""
        for fd, file in zip((1, 2), self._kept, strict=False):
            file.seek(0)
            with open(fd, "wb", closefd=False) as out:
                while piece := file.read(protocol.CHUNK):
                    out.write(piece)
        self._drop()

    def forget(self) -> None:
        """The first run has it: what the template itself might say is for nobody."""
        if self._kept:
            nothing = os.open("/dev/null", os.O_WRONLY)
            for fd in (1, 2):
                os.dup2(nothing, fd)
            os.close(nothing)
        self._drop()

    def _drop(self) -> None:
        for file in self._kept:
            file.close()
        self._kept.clear()


class _Unfit(Exception):
    """It cannot be a template; the text is for the run, if there is any."""


def _become(plan: dict[str, Any], settings: Settings, said: Said) -> None:
    runner = importlib.import_module(settings.runner.partition(":")[0])
    if not hasattr(runner, "prepare"):
        raise _Unfit
    try:
        os.chdir(settings.workspace)
        said.keep()
        if plan["preload"]:
            _preload(runner, plan)
        before = _traces(_threads())
        with _Watch(plan["private"]) as watch:
            runner.prepare(plan["source_path"], plan["module"])
        sys.stdout.flush()
        sys.stderr.flush()
    except _Unfit:
        raise
    except BaseException as failure:  # the run will meet it again, where it can be told
        raise _Unfit from failure
    if watch.alarmed or _traces(_threads()) != before:
        raise _Unfit


def _preload(runner: Any, plan: dict[str, Any]) -> None:
    before = _traces(_python_threads())
    with contextlib.suppress(PerRun), _Watch(plan["private"]) as watch:  # which will have noticed
        runner.preload(plan["source_path"], plan["preload"])
    if watch.alarmed:
        raise _Unfit("one asks, when it is imported, for what belongs to a single run")
    if _traces(_python_threads()) != before:
        raise _Unfit("one leaves a thread, a child, an open file or a signal handler behind")


class _Watch:
    """While it lasts, whoever asks for what differs from run to run is stopped, and remembered."""

    def __init__(self, private: list[str]) -> None:
        self.private = frozenset(private)
        self.alarmed = False

    def __enter__(self) -> _Watch:  # noqa: PYI034  (Self is too new for some images)
        from helmr import runtime

        watch = self
        plain: Any = type(os.environ)

        class Environment(plain):  # type: ignore[misc]
            """os.environ, with an eye on who reads what."""

            def __getitem__(self, name: str) -> str:
                if name in watch.private:
                    watch.alarm()
                value: str = super().__getitem__(name)
                return value

        class Run:
            """In the place of the run there is none of."""

            def __getattr__(self, name: str) -> NoReturn:
                watch.alarm()

        self._plain = plain
        os.environ.__class__ = Environment
        runtime.install(Run())  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        from helmr import runtime

        os.environ.__class__ = self._plain
        runtime.install(None)

    def alarm(self) -> NoReturn:
        self.alarmed = True
        raise PerRun


def _traces(threads: int) -> tuple[object, ...]:
    """What an import may leave behind that cannot be shared by forked processes, or would be lost in them."""
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return _lowest_free_descriptor(), threads, _has_children(), handlers


def _lowest_free_descriptor() -> int:
    """Rises with every descriptor that stays open; listing them is not allowed to a process that changed its user."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        return _python_threads()


def _python_threads() -> int:
    """Without those that a library has started in C."""
    threading = sys.modules.get("threading")
    return threading.active_count() if threading else 1


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
