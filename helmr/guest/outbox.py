"""The task's end of its control socket: length-prefixed JSON messages, whole or not at all, from any thread.

Messages and output travel on different channels, and must arrive in the order they were made all the same. What was printed
before a log line is in the pipe before the line is sent, and the supervisor empties the pipes first. What is printed after one
waits, in :class:`OrderedStream`, until the supervisor has taken the line; several lines in a row cost nothing.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from helmr import jsonform
from helmr.errors import Unavailable
from helmr.guest import protocol
from helmr.guest.inbox import Inbox
from helmr.guest.interruption import Interruption

#: What the supervisor accepts as one message, in bytes.
MAX_MESSAGE = 1024 * 1024
#: An output of more bytes travels in parts. A character of JSON text is at most 4 bytes, or 2 if it has to be escaped again.
INLINE_OUTPUT = 512 * 1024
PART_CHARACTERS = 200_000

_LENGTH = struct.Struct(">I")


class Outbox:
    """Sends messages, one at a time; a full socket blocks the sender, which is how back-pressure reaches a chatty task."""

    def __init__(self, sock: socket.socket, interruption: Interruption) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._lock = threading.Lock()
        self._interruption = interruption
        self._pid = os.getpid()
        self._unsettled = False
        self._settling = threading.Lock()
        self._inbox = Inbox(sock, interruption)

    def order_streams(self, muted: Callable[[], bool]) -> None:
        """Have everything printed from now on wait for the log lines before it, and be dropped while ``muted``."""
        for stream in _streams:
            stream.settle, stream.muted = self.settle, muted

    def leave_streams(self) -> None:
        """Have what is printed neither wait nor be dropped any more."""
        for stream in _streams:
            stream.settle = stream.muted = None

    def settle(self) -> None:
        """Return when the supervisor has taken the log lines sent so far."""
        if not self._unsettled or os.getpid() != self._pid:  # a forked child has no say on this socket
            return
        with self._settling:
            self._unsettled = False
            try:
                taken = self._inbox.synced
                self._post(protocol.SYNC)
                self._inbox.wait_for(lambda: self._inbox.synced > taken or None)
            except (OSError, Unavailable):
                return  # nobody listens any more: there is no order to keep

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message that has an ``id``, and wait for the answer to it.

        Raises:
            Unavailable: nobody is there any more.
        """
        self.send(message)
        return self._inbox.wait_for(lambda: self._inbox.answers.pop(message["id"], None))

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            Unavailable: nobody is there to receive it.
            ValueError: it exceeds 1 MiB.
        """
        logged = message["op"] == "log"
        if logged or "id" in message:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        body = jsonform.encode(message)
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a control message of {len(body):,} bytes is more than 1 MiB")
        self._post(body)
        if logged:
            self._unsettled = True

    def _post(self, body: bytes) -> None:
        with self._interruption, self._lock:
            try:
                self._sock.sendall(_LENGTH.pack(len(body)) + body)
            except OSError as failure:
                raise Unavailable("the supervisor of this task no longer listens") from failure

    def send_result(self, output: Any, text: str) -> None:
        """Send the output of the task; ``text`` is its JSON. A long one goes in parts, because messages are limited."""
        if len(text.encode("utf-8", "replace")) <= INLINE_OUTPUT:
            self.send({"op": "result", "output": output})
            return
        parts = [text[at : at + PART_CHARACTERS] for at in range(0, len(text), PART_CHARACTERS)]
        for part in parts:
            self.send({"op": "result_part", "data": part})
        self.send({"op": "result", "parts": len(parts)})


class OrderedStream(io.TextIOWrapper):
    """Standard output or error of a task: what is printed waits for the log lines that came before it.

    The waiting is done here and not below, in the raw file: an interruption there, after the bytes are out and before the
    buffer knows, would have them written twice.
    """

    settle: Callable[[], None] | None = None  #: waits; None as long as there is no run
    muted: Callable[[], bool] | None = None  #: whether what is printed was printed before

    def __init__(self, fd: int, errors: str) -> None:
        raw = io.FileIO(fd, "w", closefd=False)
        # Line by line, as on a terminal: print() must arrive while the task runs.
        super().__init__(io.BufferedWriter(raw), "utf-8", errors, line_buffering=True)

    def write(self, text: str, /) -> int:
        """Write after what was logged before; nothing while the code runs again, up to where it was."""
        if self.muted is not None and self.muted():
            return len(text)
        if self.settle is not None:
            self.settle()
        return super().write(text)


_streams: list[OrderedStream] = []


def open_streams() -> None:
    """Put ordered streams in the place of the standard ones; modules that are imported later may hold on to them."""
    _streams[:] = [OrderedStream(1, "surrogateescape"), OrderedStream(2, "backslashreplace")]
    sys.stdout, sys.stderr = _streams
