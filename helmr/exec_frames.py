"""What a client and the worker of an exec say to each other while it runs: bytes with offsets, and how much of them arrived.

Messages of core NATS may be lost when a connection is, so everything that counts has an offset or can be repeated. Output is
not among the frames: it goes through a stream (:mod:`worker.exec_output`), each message 8 bytes of offset and then the bytes.

To the worker: :class:`Attach` (which is answered, and repeated now and then), :class:`Data`, :class:`End`, :class:`Ack`,
:class:`Signal`, :class:`Resize`, :class:`Leave`. To a client: :class:`Credit` and :class:`Displaced`.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from helmr import subjects
from helmr.models import ExecChunk

#: Bytes of input that may be on their way to a process, and bytes of output on their way to the client that steers it.
INPUT_WINDOW = 2 * 1024 * 1024
OUTPUT_WINDOW = 4 * 1024 * 1024
#: Bytes in one message, either way.
CHUNK = 128 * 1024
#: Precedes the bytes of output.
OFFSET = Struct(">Q")


class Attach(msgspec.Struct, frozen=True, tag="attach", array_like=True):
    """This client steers the exec from now on, having got so much of its output."""

    client: str
    stdout: int = 0
    stderr: int = 0


class Data(msgspec.Struct, frozen=True, tag="data", array_like=True):
    """Input, from an offset on."""

    offset: int
    data: bytes


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """The input ends at an offset."""

    offset: int


class Ack(msgspec.Struct, frozen=True, tag="ack", array_like=True):
    """So much of the output is dealt with."""

    client: str
    stdout: int
    stderr: int


class Signal(msgspec.Struct, frozen=True, tag="signal", array_like=True):
    """A signal for the main process and its group."""

    number: int


class Resize(msgspec.Struct, frozen=True, tag="resize", array_like=True):
    """The terminal's new size."""

    rows: int
    columns: int


class Leave(msgspec.Struct, frozen=True, tag="leave", array_like=True):
    """The client goes; ``stay``: the exec goes on without anybody, else it is to be ended."""

    client: str
    stay: bool


class Credit(msgspec.Struct, frozen=True, tag="credit", array_like=True):
    """So much input has been received without a gap, and so much of it been taken by the process.

    ``again``: what followed has to be sent again. ``ended``: the end of the input has arrived, too.
    """

    received: int
    taken: int
    again: bool = False
    ended: bool = False


class Displaced(msgspec.Struct, frozen=True, tag="displaced", array_like=True):
    """Another client steers the exec now."""


def parse_output(subject: str, data: bytes, *, seq: int = 0) -> ExecChunk:
    """The chunk of a stored (or, without ``seq``, live) message of output."""
    (offset,) = OFFSET.unpack_from(data)
    stream = subjects.parse_exec_output(subject).stream
    return ExecChunk(seq=seq, stream=stream, offset=offset, data=data[OFFSET.size :])


FromClient = Attach | Data | End | Ack | Signal | Resize | Leave
FromWorker = Credit | Displaced

_encoder = msgspec.msgpack.Encoder()
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(frame: FromClient | FromWorker) -> bytes:
    """A frame as it travels."""
    return _encoder.encode(frame)


def from_client(data: bytes) -> FromClient:
    """The frame that a client sent.

    Raises:
        msgspec.DecodeError: it is none.
    """
    frame: FromClient = _from_client.decode(data)
    return frame


def from_worker(data: bytes) -> FromWorker:
    """The frame that a worker sent.

    Raises:
        msgspec.DecodeError: it is none.
    """
    frame: FromWorker = _from_worker.decode(data)
    return frame
