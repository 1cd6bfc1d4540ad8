"""One process tree as the supervisor sees it: three descriptors to read, a shim to order about, one journal to fill.

Order is the promise here. Bytes of a stream stay in order; a control message comes after all output that was written before
it; the exit frame is last, exactly once, and only when nothing of the tree is left.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import time
from collections import deque

from helmr.guest import exec_ends, files, protocol
from helmr.guest.journal import Journal
from helmr.guest.process_input import ProcessInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from helmr.guest.shims import Key, Shim

#: Seconds that a shim may take to end a tree whose time is up, and to say so; after that a task must have stopped it.
_PATIENCE = 2.0
#: How often a pipe is read at most before something else gets its turn: a pipe can be enlarged to 1 MiB.
_DRAIN = 1024 * 1024 // protocol.CHUNK


class Ends:
    """The far ends of a new process' descriptors, on their way to a shim."""

    def __init__(self, control: socket.socket, stdout: int, stderr: int) -> None:
        self.control = control
        self.pipes = (stdout, stderr)

    def numbers(self) -> list[int]:
        return [self.control.fileno(), *self.pipes]

    def __enter__(self) -> Ends:  # noqa: PYI034  (Self is too new for some images)
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        for fd in self.pipes:
            os.close(fd)


class _Stream:
    """The read end of stdout or stderr, or a terminal; ``full``: a read of fewer bytes has emptied it."""

    __slots__ = ("fd", "full", "kind", "offset")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.fd = -1
        self.full = protocol.CHUNK
        self.offset = 0


class Child:
    """A process tree, from its start until its exit frame is in the journal."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        ended: Callable[[Child, dict[str, Any]], None],
        sent: Callable[[Child, str | None], None],
        taken: Callable[[Child, int], None],
    ) -> None:
        self.ident = ""
        self.kind = ""
        self.journal = Journal(0)
        self.alive = True
        self.alone = True  #: no other process was alive meanwhile (for whom the kernel killed one)
        self.oom_kills = 0  #: the counter at the start
        self.broken = ""  #: how the task broke the control protocol
        self.shim: Shim | None = None  #: what looks after the tree
        self.overdue_at = math.inf  #: when it must be over, whatever its shim does
        self.forced = False  #: it was ended together with its shim
        self.ending = ""  #: what it was asked to end for, if it was: ``cancel``, or ``deadline``
        self.key: Key | None = None  #: the template it is, or may be, forked from
        self._selector = selector
        self._ended = ended
        self._sent = sent
        self._taken = taken
        self._input: ProcessInput | None = None
        self._terminal = -1
        self._streams = (_Stream(protocol.STDOUT), _Stream(protocol.STDERR))
        self._inbox = protocol.MessageReader()
        self._outbox: deque[tuple[memoryview, bool, list[int]]] = deque()
        self._control: socket.socket | None = None
        self._control_mask = 0
        self._parked = True

    def name(self, number: int, ident: str, kind: str) -> None:
        """Give a process, forked already or not, its identity; before it has said anything."""
        self.journal.number = number
        self.ident = ident
        self.kind = kind

    def describe(self) -> dict[str, Any]:
        """What a client that says hello is told about it."""
        taken = self.journal.last - self.journal.frames_held
        return {"number": self.journal.number, "id": self.ident, "kind": self.kind, "taken": taken}

    @property
    def prepared(self) -> bool:
        """Whether it has its descriptors, and a process at the other end of them."""
        return self._control is not None

    @property
    def done(self) -> bool:
        """Whether it has ended and everything it said has been acknowledged."""
        return not self.alive and not self.journal.frames_held

    def open(self, owner: tuple[int, int] | None) -> Ends:
        """Make the descriptors; ``owner`` becomes owner of the pipes, so that the task can reopen /dev/stdout.

        Raises:
            OSError: there are no more descriptors.
        """
        made: list[Any] = []
        try:
            made += socket.socketpair()
            for _ in self._streams:
                made += os.pipe()
            if owner is not None:
                for fd in (made[3], made[5]):
                    os.fchown(fd, *owner)
        except OSError:
            for item in made:
                os.close(item) if isinstance(item, int) else item.close()
            raise
        self._control = made[0]
        made[0].setblocking(False)
        for stream, fd in zip(self._streams, (made[2], made[4]), strict=True):
            os.set_blocking(fd, False)
            stream.fd = fd
        self.unpark()
        return Ends(made[1], made[3], made[5])

    # Reading what the tree says

    def park(self) -> None:
        """Read nothing more until the worker has caught up; the task blocks when its pipe is full."""
        self._parked = True
        for stream in self._streams:
            if stream.fd >= 0:
                self._selector.unregister(stream.fd)
        self._watch_control()

    def unpark(self) -> None:
        """Read (again)."""
        if not self._parked or not self.alive or self.journal.full:
            return
        self._parked = False
        for stream in self._streams:
            if stream.fd >= 0:
                self._selector.register(stream.fd, selectors.EVENT_READ, lambda stream=stream: self._on_pipe(stream))
        self._watch_control()

    def _on_pipe(self, stream: _Stream) -> None:
        if self._parked:
            return
        self._read(stream)
        self._check_window()

    def _check_window(self) -> None:
        if self.journal.full and not self._parked and self.alive:
            self.park()

    def _read(self, stream: _Stream) -> int:
        """Move what one read yields into the journal; returns its size."""
        if stream.fd < 0:
            return 0
        try:
            data = os.read(stream.fd, protocol.CHUNK)
        except BlockingIOError:
            return 0
        except OSError:  # of a terminal whose other end nobody has open any more
            data = b""
        if data:
            self.journal.append(stream.kind, data, protocol.OFFSET.pack(stream.offset))
            stream.offset += len(data)
        else:
            self._close_stream(stream)
        return len(data)

    def _drain(self) -> None:
        """Read what is in the pipes now. A read that is not full has emptied its pipe."""
        for stream in self._streams:
            for _ in range(_DRAIN):
                if self._read(stream) < stream.full:
                    break

    def _close_stream(self, stream: _Stream) -> None:
        if not self._parked:
            self._selector.unregister(stream.fd)
        os.close(stream.fd)
        stream.fd = -1

    # The control socket

    def _watch_control(self) -> None:
        """Watch the control socket for just what is wanted: nothing, messages, room to write."""
        mask = 0
        if self._control is not None:
            mask |= 0 if self._parked else selectors.EVENT_READ
            mask |= selectors.EVENT_WRITE if self._outbox else 0
        if mask == self._control_mask or self._control is None:
            return
        if not self._control_mask:
            self._selector.register(self._control, mask, self._on_control)
        elif not mask:
            self._selector.unregister(self._control)
        else:
            self._selector.modify(self._control, mask, self._on_control)
        self._control_mask = mask

    def _on_control(self) -> None:
        if self._outbox:
            self._write()
        if not self._parked and self._control is not None:
            self._listen()
            self._check_window()

    def _listen(self) -> int:
        """Read messages. What was written before them is in the pipes by now: it goes first."""
        if self._control is None:
            return 0
        try:
            data = self._control.recv(protocol.CHUNK)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        self._drain()
        if data:
            self._accept(data)
        else:
            self._close_control()
        return len(data)

    def _accept(self, data: bytes) -> None:
        if self.broken:
            return
        try:
            for text in self._inbox.feed(data):
                if text == protocol.SYNC:
                    self.send(protocol.SYNCED, answer=False)
                    continue
                protocol.check_message(text)
                self.journal.append(protocol.MESSAGE, text)
        except protocol.ProtocolError as error:
            self.broken = str(error)
            self.cancel(0)

    def send(self, text: bytes, *, answer: bool = True) -> None:
        """Queue a message for the task; with ``answer``, ``sent`` is called when the task's socket has taken it."""
        self._outbox.append((memoryview(protocol.LENGTH.pack(len(text)) + text), answer, []))
        self._write()

    # What execs have beside that

    def equip(self, spec: dict[str, Any], owner: tuple[int, int] | None) -> None:
        """Hand over, behind its order, what an exec needs beside that: an input, or a terminal in the place of all three.

        Raises:
            OSError: it cannot be made.
        """
        terminal = spec.get("terminal")
        ours, theirs = exec_ends.terminal(terminal, owner) if terminal else exec_ends.pipe(owner)
        if terminal:
            self._terminal = os.dup(ours)
            self._look_at(self._streams[0], self._terminal)
        self._input = ProcessInput(self._selector, ours, lambda size: self._taken(self, size), terminal=bool(terminal))
        self._outbox.append((memoryview(exec_ends.TOKEN), False, [theirs]))
        self._write()

    def _look_at(self, stream: _Stream, terminal: int) -> None:
        """Read a terminal from now on, and not the pipe that nobody will write to."""
        self._close_stream(stream)
        stream.fd = terminal
        stream.full = 1  # it hands out a line at a time
        if not self._parked:
            self._selector.register(stream.fd, selectors.EVENT_READ, lambda: self._on_pipe(stream))

    def feed(self, data: bytes) -> None:
        """Pass bytes on to its input; those of a process that has none are gone."""
        if self._input is not None:
            self._input.put(data)

    def end_input(self) -> None:
        """Have its input end after what was fed."""
        if self._input is not None:
            self._input.end()

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        if self.alive and self._streams[0].fd >= 0 and self._terminal >= 0:
            exec_ends.resize(self._terminal, rows, columns)

    def _write(self) -> None:
        while self._outbox:
            view, answer, descriptors = self._outbox.popleft()
            error = None
            try:
                if self._control is None:
                    error = "the process has closed its control socket"
                else:
                    view = view[files.send(self._control, view, descriptors) :]
            except BlockingIOError:
                self._outbox.appendleft((view, answer, descriptors))
                break
            except OSError as failure:
                error = f"the process does not listen: {failure.strerror}"
            for fd in descriptors:
                os.close(fd)
            if view and error is None:
                self._outbox.appendleft((view, answer, []))
            elif answer:
                self._sent(self, error)
        self._watch_control()

    def _close_control(self) -> None:
        if self._control is None:
            return
        if self._control_mask:
            self._selector.unregister(self._control)
            self._control_mask = 0
        self._control.close()
        self._control = None
        self._write()

    # The shim

    def limit(self, deadline: float, grace: float) -> None:
        """Have the shim end the tree after ``deadline`` seconds; one that is being ended anyway has no more time for that."""
        if self.ending != "cancel":
            self.ending = "deadline"
            self.overdue_at = time.monotonic() + deadline + grace + _PATIENCE
        self._order(protocol.DEADLINE, deadline, grace)

    def cancel(self, grace: float) -> None:
        """Have the shim end the tree within ``grace`` seconds."""
        overdue_at = time.monotonic() + grace + _PATIENCE
        if overdue_at < self.overdue_at:
            self.ending, self.overdue_at = "cancel", overdue_at
        self._order(protocol.CANCEL_ORDER, grace, 0.0)

    def end_by_force(self) -> None:
        """Kill the tree together with its shim, which has not ended it; to be repeated if that does not help, either."""
        self.overdue_at = time.monotonic() + _PATIENCE
        self.forced = True
        if self.shim is not None:
            self.shim.kill()

    def signal(self, number: int) -> None:
        """Have the shim signal the main process and its group."""
        self._order(protocol.SIGNAL_ORDER, float(number), 0.0)

    def _order(self, kind: bytes, first: float, second: float) -> None:
        if self.shim is not None and self.alive:
            self.shim.order(kind, first, second)

    def finish(self, report: dict[str, Any]) -> None:
        """The tree is gone: take what its pipes still hold, window or not, and add the exit frame."""
        if not self.alive:
            return
        for _ in range(_DRAIN):
            if not self._listen():
                break
        self._drain()
        self.alive = False
        for stream in self._streams:
            if stream.fd >= 0:
                self._close_stream(stream)
        self._close_control()
        if self._input is not None:
            self._input.close()
        self._parked = True
        self._ended(self, report)
