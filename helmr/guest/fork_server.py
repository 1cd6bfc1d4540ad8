"""Starts the zygote: apart from all that the supervisor imports, so that both can import at the same time."""

from __future__ import annotations

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from helmr.guest.options import Options

_ZYGOTE_FD = 3


class ForkServer:
    """A zygote that was started, and the end of the socket that takes requests to it."""

    def __init__(self, options: Options) -> None:
        """Start it as a fresh interpreter: a fork of ours would hand on what we have seen of secrets."""
        self.requests, theirs = socket.socketpair()
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
        # Not isolated: the site-packages and the PYTHON* variables of the image are what tasks are to see.
        argv = [sys.executable, "-B", script, *options.settings()]
        with theirs:
            self.pid = os.posix_spawn(
                sys.executable,
                argv,
                options.environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _ZYGOTE_FD)],
            )
        self.requests.setblocking(False)
