"""The task's end of its control socket: length-prefixed JSON messages, whole or not at all, from any thread."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

from helmr import jsonform
from helmr.errors import Unavailable
from helmr.guest.interruption import Interruption

#: What the supervisor accepts as one message, in bytes.
MAX_MESSAGE = 1024 * 1024
#: An output of more bytes travels in parts. A character of JSON text is at most 4 bytes, or 2 if it has to be escaped again.
INLINE_OUTPUT = 512 * 1024
PART_CHARACTERS = 200_000

_LENGTH = struct.Struct(">I")


class Outbox:
    """Sends messages, one at a time; a full socket blocks the sender, which is how back-pressure reaches a chatty task."""

    def __init__(self, sock: socket.socket, interruption: Interruption) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._lock = threading.Lock()
        self._interruption = interruption

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            Unavailable: nobody is there to receive it.
            ValueError: it exceeds 1 MiB.
        """
        body = jsonform.encode(message)
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a control message of {len(body):,} bytes is more than 1 MiB")
        with self._interruption, self._lock:
            try:
                self._sock.sendall(_LENGTH.pack(len(body)) + body)
            except OSError as failure:
                raise Unavailable("the supervisor of this task no longer listens") from failure

    def send_result(self, output: Any, text: str) -> None:
        """Send the output of the task; ``text`` is its JSON. A long one goes in parts, because messages are limited."""
        if len(text.encode("utf-8", "replace")) <= INLINE_OUTPUT:
            self.send({"op": "result", "output": output})
            return
        parts = [text[at : at + PART_CHARACTERS] for at in range(0, len(text), PART_CHARACTERS)]
        for part in parts:
            self.send({"op": "result_part", "data": part})
        self.send({"op": "result", "parts": len(parts)})
