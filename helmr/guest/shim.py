"""The process above tasks: it adopts their orphans, keeps their deadlines, ends whole trees and reports how they ended.

It is a process of its own so that ending a tree, however hostile, never keeps the supervisor from relaying the others, and so
that a tree ends even when the supervisor is killed: its end of the link closes then. One tree at a time lives below it, and
many in a row. Between them nothing does, but perhaps a template (:mod:`helmr.guest.template`), which goes, too, when a tree
did not end by itself.

Over the link come orders (:data:`helmr.guest.protocol.ORDER`). What goes back are lines of JSON: ``{pid}``, and for each tree
one report, ``{exit_code, signal, killed, cause, detail, template, unfit}``, sent when nothing of the tree is left.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time

from helmr.guest import files, launch, protocol, tree
from helmr.guest.files import Files
from helmr.guest.signals import DEAF, SignalPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main(link: socket.socket, settings: launch.Settings) -> NoReturn:
    """Be a shim until the supervisor closes the link."""
    signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)
    tree.become_subreaper()
    report(link, pid=os.getpid())
    _Shim(link, settings).serve()
    os._exit(0)


def report(link: socket.socket, **facts: object) -> None:
    """Tell the supervisor who we are, or how a tree ended; if the supervisor is gone nobody needs to know."""
    try:
        link.sendall(json.dumps(facts).encode() + b"\n")
    except OSError:
        return


class _Host:
    """The process right below the shim: a task, or the template that forks tasks."""

    def __init__(self, pid: int, hatch: socket.socket) -> None:
        self.pid = pid
        self.hatch = hatch
        self.template = False
        self.heard = b""
        self.returned: list[int] = []  #: descriptors that it gave back


class _Run:
    """One tree, from its order until nothing of it is left."""

    def __init__(self) -> None:
        self.pid: int | None = None  #: of its main process, once known
        self.status: int | None = None  #: as os.waitpid gives it, of the main process
        self.lost = False  #: how the main process ended cannot be known any more
        self.killed = False  #: a process that we reaped had been killed, and not by us
        self.killing = False
        self.unfit = False
        self.tampered = False  #: somebody had designs on the template
        self.cause = "exit"
        self.complaint = ""
        self.deadline: float | None = None
        self.grace = 0.0
        self.importing = False  #: the deadline is for the imports of a template
        self.kill_at: float | None = None

    def imported(self) -> None:
        """Take note that there is a template, or will be none."""
        if self.importing:
            self.deadline, self.importing = None, False

    @property
    def over(self) -> bool:
        """Whether its main process is: then everybody else in the tree has to go, too."""
        return self.lost or self.status is not None

    @property
    def orderly(self) -> bool:
        """Whether it ended by itself, so that what it ran below can be trusted to be as it was."""
        if self.cause != "exit" or self.lost or self.tampered:
            return False
        return self.status is not None and os.WIFEXITED(self.status)


class _Shim:
    """The loop, the host, and the tree of the moment."""

    def __init__(self, link: socket.socket, settings: launch.Settings) -> None:
        self.link = link
        self.settings = settings
        self.wakeup = SignalPipe(signal.SIGCHLD)
        self.host: _Host | None = None
        self.run: _Run | None = None
        self.orders = b""
        self.descriptors: list[int] = []
        self.poller = select.poll()
        self.poller.register(self.wakeup, select.POLLIN)
        self.poller.register(link, select.POLLIN)

    def serve(self) -> None:
        """See tree after tree to its end, until the supervisor is gone; then end what is there."""
        while True:
            ready = {fd for fd, _ in self.poller.poll(self.patience())}
            if self.host is not None and self.host.hatch.fileno() in ready:
                self.hear(self.host)
            if self.wakeup.fileno() in ready:
                self.wakeup.received()
                self.reap(os.WNOHANG | os.WUNTRACED)
            if self.link.fileno() in ready and not self.obey():
                break
            if self.run is not None and (self.run.over or self.due(self.run)):
                self.conclude(self.run)
        tree.exterminate(self.reap)

    # The clock

    def patience(self) -> float | None:
        """Milliseconds until the clock demands something."""
        times = [at for at in (self.run.deadline, self.run.kill_at) if at is not None] if self.run else []
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def due(self, run: _Run) -> bool:
        """Whether the time of everybody in the tree has come; a deadline that has passed starts the grace."""
        now = time.monotonic()
        if run.deadline is not None and now >= run.deadline:
            run.deadline = None
            self.terminate(run, "deadline", run.grace)
        return run.kill_at is not None and now >= run.kill_at

    def terminate(self, run: _Run, cause: str, grace: float) -> None:
        """Ask the tree to end within ``grace`` seconds; a second request can only shorten that."""
        kill_at = time.monotonic() + grace
        if run.kill_at is not None:
            run.kill_at = min(run.kill_at, kill_at)
            return
        run.cause = cause
        run.kill_at = kill_at
        if grace > 0:
            tree.terminate(os.getpid())

    # Orders

    def obey(self) -> bool:
        """Read orders; False when the supervisor is gone."""
        try:
            data, descriptors = files.receive(self.link, 4096)
        except OSError:  # it went with a report unread
            return False
        self.orders += data
        self.descriptors += descriptors
        while len(self.orders) >= protocol.ORDER.size:
            kind, first, second = protocol.ORDER.unpack_from(self.orders)
            self.orders = self.orders[protocol.ORDER.size :]
            if kind == protocol.PREPARE:
                self.prepare()
            elif self.run is not None:
                self.heed(self.run, kind, first, second)
        return bool(data)

    def heed(self, run: _Run, kind: bytes, first: float, second: float) -> None:
        if kind == protocol.CANCEL_ORDER:
            self.terminate(run, "cancel", first)
        elif kind == protocol.SIGNAL_ORDER:
            tree.send_group(run.pid, int(first))
        elif run.kill_at is None:
            run.deadline = time.monotonic() + first
            run.grace = second
            run.importing = kind == protocol.IMPORT_ORDER

    def prepare(self) -> None:
        """Have a process wait for its order, forked by the template if there is one."""
        self.run = _Run()
        given, self.descriptors = self.descriptors[: protocol.DESCRIPTORS], self.descriptors[protocol.DESCRIPTORS :]
        if len(given) < protocol.DESCRIPTORS:
            for fd in given:
                os.close(fd)
            self.give_up(OSError("too many open files"))
            return
        ends = Files(*given)
        if self.host is None or not self.ask_template(self.host, ends):
            self.fork_host(ends)
        ends.close()

    def give_up(self, error: OSError) -> None:
        self.run = None
        report(self.link, detail=f"the process could not be started: {error.strerror or error}")

    def ask_template(self, host: _Host, ends: Files) -> bool:
        try:
            files.send(host.hatch, protocol.HATCH.pack(protocol.REQUEST, 0), ends.numbers())
        except OSError:
            self.clear_away()
            return False
        return True

    def fork_host(self, ends: Files, remark: str = "") -> None:
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self.give_up(error)
            return
        if pid == 0:
            ours.close()
            self.link.close()
            self.wakeup.forget()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF)
            launch.main(ends, theirs, self.settings, remark)
        theirs.close()
        self.host = _Host(pid, ours)
        self.poller.register(ours, select.POLLIN)
        if self.run is not None:
            self.run.pid = pid

    def clear_away(self) -> None:
        """End the host, whose death is no news to anybody, and all below it."""
        run, self.run = self.run, None
        tree.exterminate(self.reap)
        self.run = run

    # What is heard through the hatch

    def hear(self, host: _Host) -> bool:
        """Read what the host says; False at the end: a task closes the hatch before its own code begins."""
        try:
            data, returned = files.receive(host.hatch, 8192)
        except OSError:
            data, returned = b"", []
        host.returned += returned
        host.heard += data
        if data and not self.heed_host(host) and self.host is host:
            tree.kill([host.pid])  # it talks nonsense
        if not data:
            self.poller.unregister(host.hatch)
            host.hatch.close()
        return bool(data)

    def heed_host(self, host: _Host) -> bool:
        """Act on what the host said; False if it made no sense."""
        while len(host.heard) >= protocol.HATCH.size and self.run is not None:
            kind, number = protocol.HATCH.unpack_from(host.heard)
            size = number if kind == protocol.COMPLAINT else 0
            if not 0 <= size <= protocol.COMPLAINT_LIMIT:
                return False
            rest = host.heard[protocol.HATCH.size :]
            if len(rest) < size:
                break
            host.heard = rest[size:]
            if not self.note_message(host, self.run, kind, number, rest[:size]):
                return False
        return len(host.heard) < protocol.HATCH.size + protocol.COMPLAINT_LIMIT

    def note_message(self, host: _Host, run: _Run, kind: bytes, number: int, text: bytes) -> bool:
        if kind == protocol.FORKED:
            host.template = True
            run.pid = number
            run.imported()
            if run.kill_at is not None:  # it was not there yet when everybody was asked to end
                tree.send([number], signal.SIGTERM)
        elif kind == protocol.ENDED:
            self.note_end(run, number)
        elif kind == protocol.COMPLAINT:
            run.complaint = text.decode(errors="replace")
        elif kind == protocol.UNFIT and len(host.returned) == protocol.DESCRIPTORS:
            self.replace(host, run)
        else:
            return False
        return True

    def replace(self, host: _Host, run: _Run) -> None:
        """Start over without a template, in a process that nothing has been imported into, and that says why, if asked to."""
        ends, host.returned = Files(*host.returned), []
        remark, run.complaint = run.complaint, ""
        run.unfit = True
        run.imported()
        self.clear_away()
        self.fork_host(ends, remark)
        ends.close()

    # Ends

    def reap(self, options: int) -> bool:
        """Wait for children (see :func:`helmr.guest.tree.exterminate`)."""
        try:
            pid, status = os.waitpid(-1, options)
            while pid:
                self.note(pid, status)
                pid, status = os.waitpid(-1, options | os.WNOHANG)
        except ChildProcessError:
            return False
        return True

    def note(self, pid: int, status: int) -> None:
        host, run = self.host, self.run
        if os.WIFSTOPPED(status):
            self.note_stop(pid)
            return
        if host is not None and pid == host.pid:
            self.forget(host)
            if host.template:
                if run is not None and not run.over and not self.adopted(run):
                    run.lost = True
                return
        if run is None:
            return
        if pid == run.pid:
            self.note_end(run, status)
        elif not run.killing and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            run.killed = True

    def note_stop(self, pid: int) -> None:
        """A template that is stopped could not tell us how its task ends; whoever stopped it may have done worse."""
        if self.host is not None and pid == self.host.pid and self.host.template:
            os.kill(pid, signal.SIGCONT)
            if self.run is not None:
                self.run.tampered = True

    def note_end(self, run: _Run, status: int) -> None:
        """Take note of how the main process of the tree ended."""
        if not run.killing and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            run.killed = True
        run.status = status

    def adopted(self, run: _Run) -> bool:
        """Whether the main process has outlived its template, and is our child now."""
        return run.pid is not None and run.pid in tree.children(os.getpid())

    def forget(self, host: _Host) -> None:
        """Hear the last words of a host that is dead."""
        self.host = None
        while host.hatch.fileno() >= 0:
            self.hear(host)
        for fd in host.returned:
            os.close(fd)

    def conclude(self, run: _Run) -> None:
        """Kill what is left of the tree, and report."""
        run.killing = True
        template = self.host.pid if self.host is not None and self.host.template and run.orderly else None
        if template is None:
            tree.exterminate(self.reap)
        elif tree.children(os.getpid()) != [template] or tree.children(template):
            tree.exterminate(self.reap)  # it left something behind
            template = None
        code = os.waitstatus_to_exitcode(run.status or 0)
        facts = {} if run.lost else {"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None}
        self.run = None
        report(
            self.link,
            **facts,
            **_blame(run, code),
            killed=run.killed,
            template=template is not None,
            unfit=run.unfit,
        )


def _blame(run: _Run, code: int) -> dict[str, str]:
    """Who ended a tree (``cause``), and what else there is to say (``detail``)."""
    if not run.lost:
        return {"cause": run.cause, "detail": run.complaint if code > 0 else ""}
    if run.complaint:  # the template could not fork
        return {"cause": run.cause, "detail": run.complaint}
    cause = "unknown" if run.cause == "exit" else run.cause
    return {"cause": cause, "detail": "the process was ended together with its template"}
