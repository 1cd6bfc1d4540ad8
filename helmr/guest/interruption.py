"""How a task process hears that it should stop: SIGTERM becomes :class:`helmr.Cancelled`, but only where it does no harm.

Python runs signal handlers between any two instructions of the main thread. Raising there is what ends user code; in the
middle of a message to the supervisor it would leave half a frame on the wire, so such places are shielded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from helmr.context import Cancelled


def _die_of_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interruption:
    """The one request to stop that a task process acts on; further ones change nothing.

    A context manager: inside, the main thread must not be interrupted, and what arrives meanwhile is raised at its end.
    """

    def __init__(self) -> None:
        self.requested = False
        self.redirect: Callable[[], object] | None = None  #: called instead of raising: an event loop has its own way
        self._shields = 0
        self._pending = False

    def install(self) -> None:
        """Listen for SIGTERM, in this process but not in its children."""
        signal.signal(signal.SIGTERM, self._on_signal)
        os.register_at_fork(after_in_child=_die_of_sigterm)

    def finish(self) -> None:
        """From here on, only take note: user code is done, and its result must get out."""
        self.redirect = None
        self._shields += 1_000_000

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            return
        self.requested = True
        if self.redirect is not None:
            self.redirect()
        elif self._shields:
            self._pending = True
        else:
            raise Cancelled("the run was asked to stop")

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._shields += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._shields -= 1
        if self._pending and not self._shields:
            self._pending = False
            raise Cancelled("the run was asked to stop")
