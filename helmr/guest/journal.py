"""What one process has said and the worker has not acknowledged yet: bounded, ordered, and resent to whoever says hello next.

The bound is what makes a slow or absent worker harmless: a full journal stops the reading of the process' pipes, so the process
itself blocks, and nobody else does.
"""

from __future__ import annotations

from collections import deque

from helmr.guest import protocol

#: Unacknowledged bytes, and frames, at which a process is no longer read.
WINDOW_BYTES = 4 * 1024 * 1024
WINDOW_FRAMES = 4096


class Journal:
    """The unacknowledged frames of one process, those sent already and those yet to be sent."""

    __slots__ = ("_sent", "_unsent", "frames_held", "held", "last", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.last = 0  #: the sequence of the newest frame
        self.held = 0  #: bytes
        self.frames_held = 0
        self._sent: deque[tuple[int, bytes, bytes]] = deque()
        self._unsent: deque[tuple[int, bytes, bytes]] = deque()

    @property
    def full(self) -> bool:
        """Whether to stop reading the process."""
        return self.held >= WINDOW_BYTES or self.frames_held >= WINDOW_FRAMES

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._unsent)

    def append(self, kind: int, body: bytes, prefix: bytes = b"") -> None:
        """Add a frame with the body ``prefix + body`` (kept apart, so that output is not copied)."""
        self.last += 1
        head = protocol.HEADER.pack(kind, self.number, self.last, len(prefix) + len(body)) + prefix
        self._unsent.append((self.last, head, body))
        self.held += len(head) + len(body)
        self.frames_held += 1

    def take(self, parts: list[bytes], budget: int) -> int:
        """Move frames of about ``budget`` bytes from unsent to sent, adding their bytes to ``parts``; returns their size."""
        taken = 0
        while self._unsent and taken < budget:
            entry = self._unsent.popleft()
            self._sent.append(entry)
            parts += entry[1:]
            taken += len(entry[1]) + len(entry[2])
        return taken

    def acknowledge(self, sequence: int) -> None:
        """Forget every frame up to ``sequence``."""
        for frames in (self._sent, self._unsent):
            while frames and frames[0][0] <= sequence:
                _, head, body = frames.popleft()
                self.held -= len(head) + len(body)
                self.frames_held -= 1

    def rewind(self) -> None:
        """Send everything unacknowledged again, from the oldest on."""
        self._sent.extend(self._unsent)
        self._unsent = self._sent
        self._sent = deque()
