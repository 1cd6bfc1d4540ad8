"""A process that has imported the module of a task once, and forks a task from itself for every run of it.

Importing is most of what a short run would cost. What happens at import then happens once for many runs, as in any server
that forks, so a module that cannot stand that must not be treated so: a template that finds its module unfit (the import
fails, asks for what differs from run to run, or leaves threads, children, descriptors or signal handlers behind) gives the
task's descriptors back, and the run starts over in a process of its own.

A template runs as the tasks' user and has run user code, so that nobody relies on it: the shim above it kills it when in
doubt. It never sees an order: secrets, payload and environment of a run go to the forked task alone.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile

from helmr.guest import files, protocol, tree
from helmr.guest.files import Files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

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


def serve(plan: dict[str, Any], given: Files, hatch: Hatch, settings: Settings) -> Files:
    """Be a template for ``plan`` (``source_path, module, private``); returns only in forked tasks, with their descriptors.

    ``given`` are the descriptors of the first of them, which hears what the import had to say.
    """
    said = _Said()
    if not _is_fit(plan, settings, said):
        hatch.tell(protocol.UNFIT, 0, given.numbers())
        os._exit(0)
    tree.hide()
    gc.collect()
    gc.freeze()
    while True:
        pid = _fork(hatch)
        if pid == 0:
            take_place(given)
            said.repeat()
            return given
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


class _Said:
    """What the module says while it is imported, kept for the first run: whether that is told twice is not known before."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def keep(self) -> None:
        for fd in (1, 2):
            file = tempfile.TemporaryFile()  # noqa: SIM115  (open until told)
            os.dup2(file.fileno(), fd)
            self._kept.append(file)

    def repeat(self) -> None:
        """Say it on the descriptors 1 and 2."""
        for fd, file in zip((1, 2), self._kept, strict=False):
            file.seek(0)
            with open(fd, "wb", closefd=False) as out:
                shutil.copyfileobj(file, out)
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


def _is_fit(plan: dict[str, Any], settings: Settings, said: _Said) -> bool:
    module = importlib.import_module(settings.runner.partition(":")[0])
    prepare: Callable[[str, str], None] | None = getattr(module, "prepare", None)
    if prepare is None:
        return False
    try:
        os.chdir(settings.workspace)
        said.keep()
        before = _traces()
        with _Watch(plan["private"]) as watch:
            prepare(plan["source_path"], plan["module"])
        sys.stdout.flush()
        sys.stderr.flush()
        return not watch.alarmed and _traces() == before
    except BaseException:  # noqa: BLE001  (the run will meet it again, where it can be told)
        return False


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


def _traces() -> tuple[object, ...]:
    """What an import may leave behind that cannot be shared by forked processes, or would be lost in them."""
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return _lowest_free_descriptor(), _threads(), _has_children(), handlers


def _lowest_free_descriptor() -> int:
    """Rises with every descriptor that stays open; listing them is not allowed to a process that changed its user."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        threading = sys.modules.get("threading")
        return threading.active_count() if threading else 1


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
