"""The process above every task: it adopts the task's orphans, keeps its deadline, ends the whole tree and reports how it ended.

It is a process of its own so that ending a tree, however hostile, never keeps the supervisor from relaying the others, and so
that a tree ends even when the supervisor is killed: its end of the link closes then.

Over the link come orders (:data:`helmr.guest.protocol.ORDER`). One report goes back, a line of JSON
``{exit_code, signal, killed, cause, detail}``, sent when nothing of the tree is left.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

from helmr.guest import launch, tree
from helmr.guest.protocol import CANCEL_ORDER, ORDER
from helmr.guest.signals import SignalPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

#: What a terminal or an operator may send to everything; the shim must outlive its tree.
_DEAF = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def main(link: socket.socket, files: launch.Files, settings: launch.Settings) -> NoReturn:
    """Be the shim of a new tree; ``files`` are for the task and are closed here once it is forked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _DEAF)
    tree.become_subreaper()
    wakeup = SignalPipe(signal.SIGCHLD)
    complaints, complain = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        report(link, detail=f"the process could not be started: {error.strerror}")
        os._exit(0)
    if pid == 0:
        link.close()
        os.close(complaints)
        wakeup.forget()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEAF)
        launch.main(files, complain, settings)
    files.close()
    os.close(complain)
    _Watch(link, wakeup, pid, complaints).run()
    os._exit(0)


def report(link: socket.socket, **facts: object) -> None:
    """Tell the supervisor how the tree ended; if the supervisor is gone nobody needs to know."""
    try:
        link.sendall(json.dumps(facts).encode() + b"\n")
    except OSError:
        return


class _Watch:
    """One tree, from the fork of its main process until nothing of it is left."""

    def __init__(self, link: socket.socket, wakeup: SignalPipe, main_pid: int, complaints: int) -> None:
        self.link = link
        self.wakeup = wakeup
        self.main_pid = main_pid
        self.complaints = complaints
        self.status: int | None = None  #: as os.waitpid gives it, of the main process
        self.killed = False  #: a process that we reaped had been killed, and not by us
        self.killing = False
        self.cause = "exit"
        self.deadline: float | None = None
        self.grace = 0.0
        self.kill_at: float | None = None
        self.orders = b""

    def run(self) -> None:
        poller = select.poll()
        poller.register(self.wakeup, select.POLLIN)
        poller.register(self.link, select.POLLIN)
        while self.status is None and not self.due():
            ready = {fd for fd, _ in poller.poll(self.patience())}
            if self.wakeup.fileno() in ready:
                self.wakeup.received()
                self.reap(os.WNOHANG)
            if self.link.fileno() in ready and not self.obey():
                break
        self.killing = True
        tree.exterminate(self.reap)
        self.report()

    def patience(self) -> float | None:
        """Milliseconds until the clock demands something."""
        times = [at for at in (self.deadline, self.kill_at) if at is not None]
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def due(self) -> bool:
        """Whether the time of everybody in the tree has come; a deadline that has passed starts the grace."""
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            self.terminate("deadline", self.grace)
        return self.kill_at is not None and now >= self.kill_at

    def terminate(self, cause: str, grace: float) -> None:
        """Ask the tree to end within ``grace`` seconds; a second request can only shorten that."""
        kill_at = time.monotonic() + grace
        if self.kill_at is not None:
            self.kill_at = min(self.kill_at, kill_at)
            return
        self.cause = cause
        self.kill_at = kill_at
        if grace > 0:
            tree.terminate(os.getpid())

    def obey(self) -> bool:
        """Read orders; False when the supervisor is gone."""
        data = self.link.recv(4096)
        self.orders += data
        while len(self.orders) >= ORDER.size:
            kind, first, second = ORDER.unpack_from(self.orders)
            self.orders = self.orders[ORDER.size :]
            if kind == CANCEL_ORDER:
                self.terminate("cancel", first)
            elif self.kill_at is None:
                self.deadline = time.monotonic() + first
                self.grace = second
        return bool(data)

    def reap(self, options: int) -> bool:
        """Wait for children (see :func:`helmr.guest.tree.exterminate`)."""
        try:
            pid, status = os.waitpid(-1, options)
            while pid:
                self.note(pid, status)
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        return True

    def note(self, pid: int, status: int) -> None:
        if not self.killing and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.killed = True
        if pid == self.main_pid:
            self.status = status

    def report(self) -> None:
        code = os.waitstatus_to_exitcode(self.status or 0)
        report(
            self.link,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            killed=self.killed,
            cause=self.cause,
            detail=os.read(self.complaints, 4096).decode(errors="replace") if code > 0 else "",
        )
