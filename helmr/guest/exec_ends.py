"""What an exec is given beside a task's descriptors: an input, or a terminal that is its input, output and errors in one.

It comes behind the order, over the control socket, so that processes which wait for an order need not have it ahead. What
only terminals need is imported for them alone: a library that is loaded makes each fork dearer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

from helmr.guest import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The byte that the descriptor travels with.
TOKEN = b"E"
#: Bytes in the pipe to a process; as much as the kernel lets everybody have. Of the default of 64 KiB a copy is a third slower.
_PIPE = 1024 * 1024
_F_SETPIPE_SZ = 1031
#: A new terminal's mode: its user may use it, others may write to it if he lets them (as ``login`` does).
_MODE = 0o620


def pipe(owner: tuple[int, int] | None) -> tuple[int, int]:
    """Our end and the exec's end of an input."""
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # its user has too much of that already: it works with less
            fcntl.fcntl(ours, _F_SETPIPE_SZ, _PIPE)
    if owner is not None:
        os.fchown(theirs, *owner)
    return ours, theirs


def terminal(size: dict[str, Any], owner: tuple[int, int] | None) -> tuple[int, int]:
    """Our end and the exec's end of a terminal of ``rows`` and ``columns``."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    resize(ours, size["rows"], size["columns"])
    if owner is not None:
        os.fchmod(theirs, _MODE)  # before it is somebody else's: that of others we may not change
        os.fchown(theirs, *owner)
    return ours, theirs


def resize(ours: int, rows: int, columns: int) -> None:
    """Tell a terminal its size; what runs in it hears of that."""
    import fcntl
    import termios

    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def take(control: int, order: dict[str, Any]) -> None:
    """In the process: put the descriptor, if the order says that one follows, in its place."""
    if not order.get("input") and not order.get("terminal"):
        return
    with socket.socket(fileno=os.dup(control)) as connection:
        data, descriptors = files.receive(connection, len(TOKEN), 1)
    if not data or not descriptors:
        os._exit(1)  # it could not be made, and we are being killed for that
    (fd,) = descriptors
    if order.get("terminal"):
        import fcntl
        import termios

        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    for place in (0, 1, 2) if order.get("terminal") else (0,):
        os.dup2(fd, place)
    os.close(fd)
