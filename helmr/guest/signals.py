"""Signals as a readable file descriptor, because a loop that waits for sockets must hear of dead children at once too."""

from __future__ import annotations

import os
import signal


def _noted(_number: int, _frame: object) -> None:
    """A Python-level handler is needed for the C-level one to write to the wakeup descriptor."""


def readable(*numbers: int) -> int:
    """A non-blocking descriptor that yields one byte, the signal's number, for each of these signals that arrives."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _noted)
    return reader


def received(reader: int) -> set[int]:
    """The signals that arrived since the last call."""
    try:
        return set(os.read(reader, 4096))
    except BlockingIOError:
        return set()


def forget(reader: int, *numbers: int) -> None:
    """Undo :func:`readable` in a forked child: default dispositions, no wakeup descriptor."""
    writer = signal.set_wakeup_fd(-1)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    os.close(reader)
    os.close(writer)
