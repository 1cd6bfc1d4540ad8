"""The main process of a machine: starts, relays and ends process trees for one worker at a time, and outlives each worker.

As PID 1 of a container it also reaps what is orphaned and obeys SIGTERM. It waits in one place, for readiness or for the end
of its patience with nobody being there; it never waits for a client, a task or the zygote. The worker's side is
:mod:`worker.channel`; the frames are described in :mod:`helmr.guest.protocol`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import selectors
import signal
import time

from helmr.guest import cgroup, protocol
from helmr.guest.child import Child
from helmr.guest.doors import WayOut, listen
from helmr.guest.forks import Forks
from helmr.guest.link import Link
from helmr.guest.secret_files import SecretFiles
from helmr.guest.shims import Key, Shims
from helmr.guest.signals import SignalPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from helmr.guest.fork_server import ForkServer
    from helmr.guest.options import Options

#: Descriptors kept free of processes, so that a worker can always connect and end them.
_RESERVE = 24
#: Seconds that an ending supervisor gives a client to take the last frames.
_FAREWELL = 1.0
#: Seconds after an end until spare processes are forked: at once would slow down the one that is starting (measured, back to
#: back: first byte 2.5 ms with this, 3.7 when forked at the end of the one before, 5 without a spare; with 3 ms between runs
#: 1.0 ms).
_SPARE_AFTER_END = 0.001
#: And after a start: what ends before that leaves a shim, which saves a fork, and has had the processors for itself.
_SPARE_AFTER_START = 0.02


class Supervisor:
    """The loop, the children, and the one client."""

    def __init__(self, options: Options, zygote: ForkServer) -> None:
        self.options = options
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, Child] = {}
        self.numbers: dict[str, int] = {}
        self.next_number = 1
        self.client: Link | None = None
        self.strangers: list[Link] = []  #: connected, no hello yet
        self.deserted = time.monotonic()
        self.stopping = False
        self.spare_at: float | None = None  #: when to fork spare processes
        self.farewell: float | None = None
        self.wakeup = SignalPipe(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.selector.register(self.wakeup, selectors.EVENT_READ, self.on_signal)
        self.listener = listen(options.socket)
        self.selector.register(self.listener, selectors.EVENT_READ, self.on_connection)
        self.way_out = WayOut(options.way_out, self.selector) if options.way_out else None
        self.forks = Forks(self.selector, options, zygote)
        highest_fd = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVE
        self.shims = Shims(self.selector, self.forks, self.make_child, options.owner, highest_fd)
        self.secret_files = SecretFiles(options.secret_root, options.owner)
        self.shims.keep_ready()

    def make_child(self) -> Child:
        return Child(self.selector, self.ended, self.sent, self.taken)

    # The loop

    def serve(self) -> None:
        """Work until told to stop, or until nobody has been there for too long."""
        while not self.finished():
            for key, _ in self.selector.select(self.patience()):
                key.data()
            if self.client is not None:
                self.client.flush([child.journal for child in self.children.values() if child.journal.waiting])
            self.look_at_the_clock(time.monotonic())
        self.close()

    def look_at_the_clock(self, now: float) -> None:
        if self.spare_at is not None and now >= self.spare_at:
            self.spare_at = None
            self.shims.keep_ready()
        if self.shims.drop_at is not None and now >= self.shims.drop_at:
            self.shims.drop_idle(now)
        self.end_overdue(now)
        if self.client is None and not self.stopping and now >= self.deserted + self.options.orphan_timeout:
            self.stop(self.options.stop_grace)

    def end_overdue(self, now: float) -> None:
        """End the trees whose time is up and whose shim did nothing about it: a task without isolation can stop its shim."""
        for child in self.children.values():
            if child.alive and now >= child.overdue_at:
                self.forks.wake()
                child.end_by_force()

    def patience(self) -> float | None:
        """Seconds until the clock demands something; None while only events do."""
        times = [at for at in (self.farewell, self.spare_at, self.shims.drop_at) if at is not None]
        times += [child.overdue_at for child in self.children.values() if child.alive and child.overdue_at < math.inf]
        if self.client is None and not self.stopping:
            times.append(self.deserted + self.options.orphan_timeout)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def finished(self) -> bool:
        """Whether to end: told to, all trees gone, and the client has read everything or takes too long to."""
        if not self.stopping or any(child.alive for child in self.children.values()):
            return False
        if self.client is not None and self.farewell is None:
            self.farewell = time.monotonic() + _FAREWELL
            self.client.answer(protocol.json_frame(protocol.BYE, {"reason": "stopped"}))
            self.client.flush([child.journal for child in self.children.values()])
        if self.client is not None and self.client.idle and not any(c.journal.waiting for c in self.children.values()):
            self.client.finish()
        return self.client is None or (self.farewell is not None and time.monotonic() >= self.farewell)

    def on_signal(self) -> None:
        arrived = self.wakeup.received()
        if arrived & {signal.SIGTERM, signal.SIGINT}:
            self.stop(self.options.stop_grace)
        if signal.SIGCHLD in arrived:
            self.reap()

    def reap(self) -> None:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            while pid:
                self.forks.ended(pid)
                pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return

    def stop(self, grace: float) -> None:
        """End every tree; when all are gone the loop ends."""
        self.stopping = True
        self.spare_at = None
        for child in self.children.values():
            child.cancel(grace)

    def close(self) -> None:
        for link in [*self.strangers, *([self.client] if self.client else [])]:
            link.close()
        self.listener.close()
        if self.way_out is not None:
            self.way_out.close()
        self.secret_files.clear()
        os.unlink(self.options.socket)
        self.shims.close()
        self.forks.end()

    # Clients

    def on_connection(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        self.strangers.append(Link(connection, self.selector, self.on_frames, self.on_lost))
        if len(self.strangers) > _RESERVE // 3:
            self.strangers[0].close()

    def on_lost(self, link: Link) -> None:
        if link is self.client:
            self.client = None
            self.deserted = time.monotonic()
        elif link in self.strangers:
            self.strangers.remove(link)

    def on_frames(self, link: Link, frames: list[tuple[int, int, int, bytes]]) -> None:
        for kind, number, sequence, body in frames:
            if not link.open:
                return
            if kind == protocol.HELLO:
                self.hello(link, json.loads(body))
            elif link is not self.client:
                raise protocol.ProtocolError("no hello")
            else:
                self.obey(kind, number, sequence, body)

    def obey(self, kind: int, number: int, sequence: int, body: bytes) -> None:
        if kind == protocol.ACK:
            self.acknowledge(number, sequence)
        elif kind == protocol.START:
            self.start(number, body)
        elif kind == protocol.SEND:
            self.send(number, body)
        elif kind == protocol.CANCEL:
            self.cancel(number, json.loads(body)["grace"])
        elif kind == protocol.LIMIT:
            self.limit(number, json.loads(body))
        elif kind == protocol.TEMPLATE:
            template = json.loads(body)
            self.shims.make_template(Key.from_wire(template), template["patience"])
        elif kind == protocol.STOP:
            self.stop(json.loads(body)["grace"])
        elif kind == protocol.PING:
            self.answer(protocol.frame(protocol.PONG, number))
        elif number in self.children:
            self.serve_exec(self.children[number], kind, body)

    def hello(self, link: Link, body: dict[str, Any]) -> None:
        """Take over from an earlier client, from where this one says it got to."""
        if self.client is not None and self.client is not link:
            self.client.answer(protocol.json_frame(protocol.BYE, {"reason": "displaced by another worker"}))
            self.client.flush([])
            self.client.close()
        if link in self.strangers:
            self.strangers.remove(link)
        self.client = link
        for child in list(self.children.values()):
            child.journal.acknowledge(body.get("taken", {}).get(child.ident, 0))
            child.journal.rewind()
            child.unpark()
            if child.done:
                self.forget(child)
        processes = [child.describe() for child in self.children.values()]
        welcome = {"version": protocol.VERSION, "pid": os.getpid(), "next": self.next_number, "processes": processes}
        link.answer(protocol.json_frame(protocol.WELCOME, welcome))

    def answer(self, frame: bytes) -> None:
        if self.client is not None:
            self.client.answer(frame)

    # What a client asks for

    def start(self, number: int, body: bytes) -> None:
        spec = json.loads(body)
        ident = spec["id"]
        if ident in self.numbers or number in self.children or self.stopping:
            code, message = "conflict", f"a process with the id {ident} exists already"
            if self.stopping:
                code, message = "unavailable", "the machine is being stopped"
            self.answer(protocol.json_frame(protocol.REFUSED, {"code": code, "message": message}, number))
            return
        self.answer(protocol.frame(protocol.STARTED, number))
        key = self.shims.key_of(spec)
        child = self.shims.take(key)
        child.key = key
        child.name(number, ident, spec.get("kind", "task"))
        self.children[number] = child
        self.numbers[ident] = number
        self.next_number = max(self.next_number, number + 1)
        self.take_note_of_company(child)
        self.shims.prepare(child)
        self.spare_at = self.spare_at or time.monotonic() + _SPARE_AFTER_START
        self.place_secrets(child, spec)
        if child.alive:
            if key is not None and child.shim is not None and child.shim.key != key:
                child.send(key.order(), answer=False)
            child.send(body, answer=False)
            self.equip(child, spec)
            if spec.get("deadline") is not None:
                child.limit(spec["deadline"], spec.get("grace", 10.0))

    def equip(self, child: Child, spec: dict[str, Any]) -> None:
        """Give an exec its input or terminal; one that cannot have it ends before it begins."""
        if not spec.get("input") and not spec.get("terminal"):
            return
        try:
            child.equip(spec, self.options.owner)
        except OSError as error:
            child.broken = f"its input could not be made: {error.strerror}"
            child.cancel(0)

    def serve_exec(self, child: Child, kind: int, body: bytes) -> None:
        """What is asked for execs alone."""
        if kind == protocol.INPUT:
            child.feed(body)
        elif kind == protocol.INPUT_END:
            child.end_input()
        elif kind == protocol.RESIZE:
            size = json.loads(body)
            child.resize(size["rows"], size["columns"])
        elif kind == protocol.SIGNAL:
            child.signal(json.loads(body)["signal"])

    def taken(self, child: Child, size: int) -> None:
        """Tell how much of its input a process has taken."""
        self.answer(protocol.frame(protocol.TAKEN, child.journal.number, 0, protocol.OFFSET.pack(size)))

    def place_secrets(self, child: Child, spec: dict[str, Any]) -> None:
        """Write the files that hold the process' secrets; one that cannot be written ends it before it begins."""
        try:
            self.secret_files.place(child.journal.number, spec.get("secret_files") or [])
        except OSError as error:
            child.finish({"detail": f"its secrets could not be put in place: {error.strerror}"})

    def take_note_of_company(self, child: Child) -> None:
        child.oom_kills = cgroup.oom_kills()
        for other in self.children.values():
            if other is not child and other.alive:
                other.alone = child.alone = False

    def send(self, number: int, body: bytes) -> None:
        child = self.children.get(number)
        if child is None or not child.alive:
            self.answer(protocol.json_frame(protocol.SENT, {"error": "the process has ended"}, number))
        else:
            child.send(body)

    def sent(self, child: Child, error: str | None) -> None:
        self.answer(protocol.json_frame(protocol.SENT, {"error": error} if error else {}, child.journal.number))

    def cancel(self, number: int, grace: float) -> None:
        child = self.children.get(number)
        if child is not None:
            child.cancel(grace)

    def limit(self, number: int, order: dict[str, Any]) -> None:
        child = self.children.get(number)
        if child is not None:
            child.limit(order["deadline"], order["grace"])

    def acknowledge(self, number: int, sequence: int) -> None:
        child = self.children.get(number)
        if child is None:
            return
        child.journal.acknowledge(sequence)
        child.unpark()
        if child.done:
            self.forget(child)

    def forget(self, child: Child) -> None:
        del self.children[child.journal.number]
        del self.numbers[child.ident]

    def ended(self, child: Child, report: dict[str, Any]) -> None:
        """Add the exit frame: the report, with what only we can know about memory and broken rules."""
        if not self.shims.ended(child, report):
            return
        self.secret_files.release(child.journal.number)
        exited = {name: report.get(name) for name in ("exit_code", "signal")}
        exited["cause"] = report.get("cause", "exit")
        exited["detail"] = report.get("detail", "")
        if child.forced and exited["cause"] == "unknown":
            exited["cause"], exited["detail"] = (
                child.ending,
                "what watched over it did not end it in time, and was killed",
            )
        if child.broken:
            exited["cause"], exited["detail"] = "exit", child.broken
        # The counter is the container's: with others alive, take only a tree that lost a process for one that was hit.
        hit = child.alone or report.get("killed", False)
        exited["oom"] = bool(hit and cgroup.oom_kills() > child.oom_kills)
        child.journal.append(protocol.EXITED, json.dumps(exited).encode())
        if not self.stopping:
            self.spare_at = time.monotonic() + _SPARE_AFTER_END
