"""The supervisor's end of the zygote: starts it, hands it the links of new shims, and replaces it if it dies."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
from collections import deque

from helmr.guest import files, tree
from helmr.guest.fork_server import ForkServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from helmr.guest.options import Options
    from helmr.guest.shims import Shim

#: Seconds for the zygote to end; it may be importing still.
_PATIENCE = 2.0


class Forks:
    """Asks the zygote for shims, in order, without ever blocking on it."""

    def __init__(self, selector: selectors.BaseSelector, options: Options, started: ForkServer | None = None) -> None:
        """``started``: the first zygote, if it has been started already."""
        self.selector = selector
        self.options = options
        self.pid = started.pid if started else None
        self.requests = started.requests if started else None
        self.queue: deque[Shim] = deque()
        self.watched = False

    def request(self, shim: Shim) -> None:
        """Have a shim forked; the far end of its link is closed when it has been handed over."""
        self.queue.append(shim)
        self.flush()

    def flush(self) -> None:
        """Hand over what the zygote's socket takes; the rest follows when it takes more."""
        while self.queue:
            theirs = self.queue[0].theirs
            try:
                self.hand_over(theirs)
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                self.close()  # dead, though we have not been told yet; another one will do it
                continue
            except OSError:
                pass  # it cannot travel: the link ends, and with it whatever was to be started over it
            self.queue.popleft()
            theirs.close()
        self.watch()

    def hand_over(self, link: socket.socket) -> None:
        if self.requests is None:
            server = ForkServer(self.options)
            self.pid, self.requests = server.pid, server.requests
        files.send(self.requests, b"S", [link.fileno()])

    def watch(self) -> None:
        """Be told when the zygote's socket takes more, if there is more."""
        wanted = bool(self.queue) and self.requests is not None
        if self.requests is not None and wanted != self.watched:
            if wanted:
                self.selector.register(self.requests, selectors.EVENT_WRITE, self.flush)
            else:
                self.selector.unregister(self.requests)
            self.watched = wanted

    def wake(self) -> None:
        """Let the zygote go on, if somebody has stopped it."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)

    def ended(self, pid: int) -> None:
        """Note a dead child of the supervisor: if it is the zygote, the next request starts another."""
        if pid != self.pid:
            return
        self.close()
        self.flush()

    def end(self) -> None:
        """Wait for the zygote to end, which it does when its shims have; not for long, it has nothing to lose."""
        requests, pid = self.requests, self.pid
        if requests is None or pid is None:
            return
        requests.shutdown(socket.SHUT_WR)
        if not select.select([requests], [], [], _PATIENCE)[0]:
            tree.kill([pid])  # with whatever keeps it: a shim that a task has stopped, say
        os.waitpid(pid, 0)
        self.close()

    def close(self) -> None:
        """Let go of the zygote; with its socket closed it ends by itself."""
        if self.requests is not None:
            if self.watched:
                self.selector.unregister(self.requests)
                self.watched = False
            self.requests.close()
        self.requests = None
        self.pid = None
