"""The input of an exec as the supervisor sees it: a buffer that the process empties at its own pace.

The buffer has no bound of its own: the worker sends no more than what it was told of having been taken allows.
"""

from __future__ import annotations

import os
import selectors
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: What ends the input of a terminal, typed at the beginning of a line.
_END_OF_FILE = b"\x04"


class ProcessInput:
    """Writes to ``fd``, which it owns; ``taken`` is called with all bytes so far that the process has taken or never will."""

    def __init__(
        self, selector: selectors.BaseSelector, fd: int, taken: Callable[[int], None], *, terminal: bool
    ) -> None:
        self._selector = selector
        self._fd = fd
        self._taken = taken
        self._terminal = terminal
        self._waiting: deque[memoryview] = deque()
        self._size = 0
        self._ending = False
        self._watched = False

    def put(self, data: bytes) -> None:
        """Add bytes; behind the end they are dropped."""
        if not self._ending:
            self._waiting.append(memoryview(data))
            self._write()

    def end(self) -> None:
        """Have the input end when all of it has been taken."""
        if self._ending:
            return
        self._ending = True
        if self._terminal:
            self._waiting.append(memoryview(_END_OF_FILE))
        self._write()

    def close(self) -> None:
        """Let go of it; what waits is for nobody any more."""
        if self._fd < 0:
            return
        self._watch(wanted=False)
        os.close(self._fd)
        self._fd = -1

    def _write(self) -> None:
        before = self._size
        while self._waiting and self._fd >= 0:
            view = self._waiting.popleft()
            try:
                done = os.write(self._fd, view)
            except BlockingIOError:
                self._waiting.appendleft(view)
                break
            except OSError:  # nobody will ever read it
                done = len(view)
            self._size += done
            if done < len(view):
                self._waiting.appendleft(view[done:])
        if self._ending and not self._waiting and not self._terminal:
            self.close()
        self._watch(wanted=bool(self._waiting))
        if self._size > before:
            self._taken(self._size)

    def _watch(self, *, wanted: bool) -> None:
        wanted = wanted and self._fd >= 0
        if wanted != self._watched:
            if wanted:
                self._selector.register(self._fd, selectors.EVENT_WRITE, self._write)
            else:
                self._selector.unregister(self._fd)
            self._watched = wanted
