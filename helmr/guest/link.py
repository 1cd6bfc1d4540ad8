"""One worker's connection as the supervisor sees it: frames come in, answers and journals go out, nothing ever waits."""

from __future__ import annotations

import selectors
import socket
from collections import deque

from helmr.guest import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from helmr.guest.journal import Journal

    Received = Callable[["Link", list[tuple[int, int, int, bytes]]], None]

#: Bytes handed to one system call at most, and of one process in a row, so that all of them get their turn.
_BATCH = 256 * 1024
_TURN = 64 * 1024
#: Bytes read at once: for more the C library would map and unmap memory each time.
_READ = 64 * 1024
#: Buffers in one system call (IOV_MAX is 1024).
_VECTOR = 512


class Link:
    """A connected client; it gets journals only once it has said hello."""

    def __init__(
        self,
        connection: socket.socket,
        selector: selectors.BaseSelector,
        received: Received,
        lost: Callable[[Link], None],
    ) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.open = True
        self._selector = selector
        self._received = received
        self._lost = lost
        self._reader = protocol.FrameReader()
        self._answers: deque[bytes] = deque()
        self._pending: list[memoryview] = []
        self._writing = False
        self._turn = 0
        selector.register(connection, selectors.EVENT_READ, self._on_ready)

    def answer(self, frame: bytes) -> None:
        """Queue a frame that is not of a journal; it goes before those."""
        self._answers.append(frame)

    @property
    def idle(self) -> bool:
        """Whether everything has been sent."""
        return not self._pending and not self._answers

    def _on_ready(self) -> None:
        # Whoever is ready to be written to is served by the flush at the end of the round.
        try:
            data = self.connection.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            self._received(self, self._reader.feed(data))
        except (protocol.ProtocolError, ValueError, KeyError):
            # Not one of ours, or broken: nothing it says can be relied on.
            self.close()

    def flush(self, journals: list[Journal]) -> None:
        """Send as much as the connection takes; the rest when it takes more."""
        try:
            while self.open and (self._pending or self._gather(journals)):
                self._advance(self.connection.sendmsg(self._pending[:_VECTOR]))
        except BlockingIOError:
            self._watch(writing=True)
        except OSError:
            self.close()
        else:
            self._watch(writing=False)

    def _gather(self, journals: list[Journal]) -> bool:
        parts: list[bytes] = list(self._answers)
        self._answers.clear()
        room = _BATCH
        for _ in journals:
            if room <= 0 or len(parts) >= _VECTOR:
                break
            self._turn = (self._turn + 1) % len(journals)
            room -= journals[self._turn].take(parts, min(room, _TURN))
        self._pending = [memoryview(part) for part in parts if part]
        return bool(self._pending)

    def _advance(self, size: int) -> None:
        done = 0
        for part in self._pending:
            if size < len(part):
                break
            size -= len(part)
            done += 1
        del self._pending[:done]
        if size:
            self._pending[0] = self._pending[0][size:]

    def _watch(self, *, writing: bool) -> None:
        if self.open and writing != self._writing:
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._selector.modify(self.connection, mask, self._on_ready)
            self._writing = writing

    def finish(self) -> None:
        """Send nothing more; the client closes when it has read everything. Closing first could cost it the last frames."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self) -> None:
        """Let the client go; what it has not acknowledged stays in the journals."""
        if not self.open:
            return
        self.open = False
        self._selector.unregister(self.connection)
        self.connection.close()
        self._lost(self)
