"""Signals as a readable file descriptor, because a loop that waits for sockets must hear of dead children at once too."""

from __future__ import annotations

import os
import signal

#: What a terminal or an operator may send to everything; whoever looks after tasks must outlive them.
DEAF = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def _noted(_number: int, _frame: object) -> None:
    """A Python-level handler is needed for the C-level one to write to the wakeup descriptor."""


class SignalPipe:
    """Yields one byte, the signal's number, for each of ``numbers`` that arrives in this process."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, _noted)

    def fileno(self) -> int:
        """What to wait for."""
        return self._reader

    def received(self) -> set[int]:
        """The signals that arrived since the last call."""
        try:
            return set(os.read(self._reader, 4096))
        except BlockingIOError:
            return set()

    def forget(self) -> None:
        """Undo it all in a forked child: default dispositions, nothing open."""
        signal.set_wakeup_fd(-1)  # since Python 3.12 a fork has done so already
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)
