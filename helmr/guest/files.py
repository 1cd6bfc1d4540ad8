"""The descriptors that a task is given, and how they travel: from the supervisor over shim and template to the task."""

from __future__ import annotations

import array
import os
import socket

from helmr.guest.protocol import DESCRIPTORS


class Files:
    """The descriptors of a task: its control socket and the write ends of its two pipes."""

    def __init__(self, control: int, stdout: int, stderr: int) -> None:
        self.control = control
        self.stdout = stdout
        self.stderr = stderr

    def numbers(self) -> list[int]:
        return [self.control, self.stdout, self.stderr]

    def close(self) -> None:
        for fd in self.numbers():
            os.close(fd)


def send(connection: socket.socket, data: bytes | memoryview, descriptors: list[int]) -> int:
    """Send ``data`` with descriptors, as ``sendmsg`` does."""
    fds = array.array("i", descriptors)
    return connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds.tobytes())] if descriptors else [])


def receive(connection: socket.socket, size: int, count: int = DESCRIPTORS) -> tuple[bytes, list[int]]:
    """At most ``size`` bytes, and the descriptors that came with them; fewer than ``count`` when we are out of descriptors."""
    fds = array.array("i")
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    data, ancillary, _, _ = connection.recvmsg(size, socket.CMSG_SPACE(count * fds.itemsize), flags)
    for _, _, raw in ancillary:
        fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return data, fds.tolist()
