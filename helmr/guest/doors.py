"""The doors of a machine: the socket where workers come in, and the one way out for what its processes want to reach.

A machine has no network of its own, only a loopback interface. What a process wants of the world it asks of a proxy there; the
supervisor owns the proxy's address, and hands the listening socket itself to the worker, which accepts connections on it from
outside and decides what may be reached. So nothing passes through this container's processes, and nothing in here has a say.
"""

from __future__ import annotations

import os
import selectors
import socket

from helmr.guest import files
from helmr.guest.options import PROXY_PORT

#: Connections that wait while no worker is there to accept them.
_BACKLOG = 128


def listen(path: str) -> socket.socket:
    """A socket for workers: only whoever owns its folder may connect, and it appears under its name once it answers."""
    folder = os.path.dirname(path) or "."  # a relative path stays one: that of a socket must be short
    draft = os.path.join(folder, "new")
    for name in (path, draft):
        if os.path.exists(name):
            os.unlink(name)
    listener = socket.socket(socket.AF_UNIX)
    previous = os.umask(0o177)
    try:
        listener.bind(draft)
    finally:
        os.umask(previous)
    owner = os.stat(folder)
    if owner.st_uid != os.geteuid():
        os.chown(draft, owner.st_uid, owner.st_gid)
    listener.listen(16)
    listener.setblocking(False)
    os.rename(draft, path)
    return listener


class WayOut:
    """The proxy's listening socket, given to whoever connects to the socket ``path``."""

    def __init__(self, path: str, selector: selectors.BaseSelector) -> None:
        self._path = path
        self._proxy = socket.create_server(("127.0.0.1", PROXY_PORT), backlog=_BACKLOG)
        self._listener = listen(path)
        selector.register(self._listener, selectors.EVENT_READ, self._give)

    def _give(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            try:
                files.send(connection, b"P", [self._proxy.fileno()])
            except OSError:
                return  # it has hung up already

    def close(self) -> None:
        """Let nobody out any more."""
        self._listener.close()
        self._proxy.close()
        os.unlink(self._path)
