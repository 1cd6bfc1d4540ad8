"""The wire formats of the in-container runtime, in one place because worker, supervisor, shims and tasks must agree on them.

Between worker and supervisor: a header of 17 bytes, big-endian (kind ``u8``, process number ``u32``, sequence ``u64``, body
length ``u32``), then the body. Frames of a process (output, message, exited) carry a sequence that counts from 1 in that
process and are kept by the supervisor until acknowledged; all other frames carry sequence 0 and are not kept.

Between supervisor and task (the control socket): a length (``u32``, big-endian), then a JSON object in UTF-8, both ways. The
supervisor passes them on as they are, except for ``SYNC``, which it answers itself: all before it has been taken.

Between supervisor and shim: orders of 17 bytes (kind, two doubles) one way, lines of JSON the other way: first ``{pid}``, then
for each tree the report. Between a shim and the process below it (the hatch): 5 bytes, kind and number, both ways.
"""

from __future__ import annotations

import json
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 2

HEADER = Struct(">BIQI")
OFFSET = Struct(">Q")
LENGTH = Struct(">I")

#: An order to a shim: ``P`` (have a process wait on the three descriptors that come along: control, stdout, stderr), ``D``
#: (seconds from now to the deadline, grace), ``I`` (the same until there is a template, or another deadline), ``C`` (end it
#: within this grace, 0) or ``S`` (the number of a signal for the main process and its group, 0).
ORDER = Struct(">cdd")
PREPARE = b"P"
DEADLINE = b"D"
IMPORT_ORDER = b"I"
CANCEL_ORDER = b"C"
SIGNAL_ORDER = b"S"

#: On the hatch. To a template: ``R`` (fork a task for the three descriptors that come along). From below: ``F`` (its pid:
#: forked), ``E`` (its wait status: it has ended), ``U`` (no good as a template; the three descriptors come back) and ``C``
#: (the length of what follows: why a process cannot begin).
HATCH = Struct(">ci")
REQUEST = b"R"
FORKED = b"F"
ENDED = b"E"
UNFIT = b"U"
COMPLAINT = b"C"
#: The most bytes of one complaint.
COMPLAINT_LIMIT = 4096
#: How many descriptors a task is given.
DESCRIPTORS = 3

#: The most a task may send in one control message, in bytes.
MAX_MESSAGE = 1024 * 1024
#: The most one frame may carry, in bytes: a start frame holds the payload of a run.
MAX_FRAME = 32 * 1024 * 1024
#: The most output one frame carries, in bytes: the capacity of a pipe.
CHUNK = 64 * 1024

# From the worker.
HELLO = 1  #: {client, taken: {process id: last sequence taken}}; displaces an earlier client
START = 2  #: the ProcessSpec as JSON; the number is chosen by the worker
SEND = 3  #: a JSON object for the task
CANCEL = 4  #: {grace}
ACK = 5  #: no body; everything up to the sequence has been taken
STOP = 6  #: {grace}; end everything, then exit
LIMIT = 7  #: {deadline, grace}; a new deadline, in seconds from now
INPUT = 8  #: bytes for the standard input, or the terminal, of a process that was started with one
INPUT_END = 9  #: no body; the input ends after what was sent
RESIZE = 10  #: {rows, columns}; of the terminal
SIGNAL = 11  #: {signal}; its number, for the main process and its group
#: {source, module, private, preload, patience}; have such a template ready, in so many seconds or not at all
TEMPLATE = 12
PING = 13  #: no body; answered at once

# From the supervisor.
WELCOME = 16  #: {version, pid, next, processes: [{number, id, kind, taken}]}
STARTED = 17  #: the start was accepted
REFUSED = 18  #: {code, message}; the start was not accepted
SENT = 19  #: {} or {error}: the answer to one SEND, in order
BYE = 20  #: {reason}; the supervisor closes the connection
TAKEN = 21  #: u64: bytes of its input that the process has taken so far, or will never take
PONG = 22  #: no body; the answer to a PING
STDOUT = 32  #: u64 offset, then bytes
STDERR = 33  #: u64 offset, then bytes
MESSAGE = 34  #: a JSON object from the task
EXITED = 35  #: {exit_code, signal, oom, cause, detail}


#: What a task asks, and the supervisor answers, to keep log lines and output in order.
SYNC = b'{"op":"sync"}'
SYNCED = b'{"op":"synced"}'


class ProtocolError(Exception):
    """The other side sent something that the format forbids."""


def frame(kind: int, process: int = 0, sequence: int = 0, body: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(kind, process, sequence, len(body)) + body


def json_frame(kind: int, body: dict[str, Any], process: int = 0) -> bytes:
    """One whole frame with a JSON object as its body."""
    return frame(kind, process, 0, json.dumps(body).encode())


class FrameReader:
    """Cuts a byte stream into frames, however it was chopped up on its way."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[tuple[int, int, int, bytes]]:
        """The frames completed by ``data``, as (kind, process, sequence, body).

        Raises:
            ProtocolError: a frame announces more than :data:`MAX_FRAME` bytes.
        """
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        with memoryview(buffer) as view:
            while len(view) - start >= HEADER.size:
                kind, process, sequence, length = HEADER.unpack_from(view, start)
                if length > MAX_FRAME:
                    raise ProtocolError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
                body = start + HEADER.size
                if body + length > len(view):
                    break
                frames.append((kind, process, sequence, bytes(view[body : body + length])))
                start = body + length
        del buffer[:start]
        return frames


def encode_message(body: dict[str, Any]) -> bytes:
    """One message for the control socket, length included."""
    text = json.dumps(body).encode()
    return LENGTH.pack(len(text)) + text


class MessageReader:
    """Cuts the bytes of a control socket into the JSON texts of its messages."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """The texts completed by ``data``; whether they are JSON is for :func:`check_message` to say.

        Raises:
            ProtocolError: a message announces more bytes than the limit.
        """
        buffer = self._buffer
        buffer += data
        texts = []
        start = 0
        while len(buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, start)
            if length > self._limit:
                raise ProtocolError(f"a control message of {length} bytes exceeds the limit of {self._limit}")
            end = start + LENGTH.size + length
            if end > len(buffer):
                break
            texts.append(bytes(buffer[start + LENGTH.size : end]))
            start = end
        del buffer[:start]
        return texts


def _not_a_number(text: str) -> None:
    raise ProtocolError(f"a control message contains {text}, which is not JSON")


def check_message(text: bytes) -> None:
    """Make sure that a task's message is a JSON object that every other JSON reader accepts too.

    Raises:
        ProtocolError: it is not JSON, not an object, nested too deeply, or contains NaN, Infinity or a lone surrogate.
    """
    try:
        body = json.loads(text, parse_constant=_not_a_number)
        if b"\\u" in text:
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a control message is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"a control message is a JSON {type(body).__name__}, not an object")
