"""The worker's end of a machine: one connection to its supervisor, taken apart into a stream of frames per process.

Nothing here needs to survive. The supervisor keeps what has not been acknowledged, so a worker that starts anew connects with
the sequences it got to (``resume``) and finds every process, and every byte, where it left off. That is also what bounds the
memory here: the supervisor sends no more of a process than its window, until some of it is acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from helmr.errors import Conflict, TooLarge, Unavailable
from helmr.guest import protocol
from worker.channel_process import ChannelProcess
from worker.engine import Exited, Frame, Message, Output, ProcessSpec, Template

__all__ = ["Channel", "ChannelProcess"]

#: Seconds between attempts to connect while a machine boots; nothing tells us when a socket in a container appears.
_RETRY = 0.002
#: Seconds that imports may take which nobody waits for: a run has a limit of its own, a module that never ends has none.
IMPORT_PATIENCE = 60.0
#: Bytes read at once, into memory that is there already.
_BUFFER = 64 * 1024


class Channel(asyncio.BufferedProtocol):
    """A connection to a supervisor; made by :meth:`connect`, useless once :attr:`lost` is set.

    The supervisor may run on an image's own Python, so what comes from it is not trusted: whatever does not fit the format, or
    exceeds the window it has to keep, ends this channel, and nothing else.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        #: What the supervisor still has, by process id, as of the hello: to be taken on, or cancelled and taken to the end.
        self.attached: dict[str, ChannelProcess] = {}
        self.pid = 0  #: of the supervisor, in its own namespace
        self.lost = ""  #: why the connection ended; empty while it lives
        self.heard = 0  #: counts what the supervisor has said
        self._processes: dict[int, ChannelProcess] = {}
        self._next = 1
        self._reader = protocol.FrameReader()
        self._transport: asyncio.WriteTransport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._welcomed: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[str] = loop.create_future()
        self._unacknowledged: dict[int, ChannelProcess] = {}
        self._acknowledging = False
        self._buffer = memoryview(bytearray(_BUFFER))
        self._reason = ""

    @classmethod
    async def connect(
        cls, path: Path, *, client: str = "", resume: Mapping[str, int] | None = None, ready_within: float = 10.0
    ) -> Channel:
        """Say hello to the supervisor behind the socket ``path``, displacing an earlier client.

        ``resume`` has, for processes known from an earlier connection, the sequence of the last frame that was taken
        (:attr:`ChannelProcess.taken`); of those not named, everything unacknowledged comes again. A supervisor that is
        still booting is waited for ``ready_within`` seconds.

        Raises:
            Unavailable: nobody answers in that time.
        """
        deadline = asyncio.get_running_loop().time() + ready_within
        try:
            async with asyncio.timeout_at(deadline):
                channel = await cls._reach(path)
                await channel._greet(client, resume or {})  # noqa: SLF001  (its own class)
        except TimeoutError as error:
            raise Unavailable(f"the supervisor behind {path} does not answer") from error
        return channel

    async def _greet(self, client: str, taken: Mapping[str, int]) -> None:
        self.write(protocol.json_frame(protocol.HELLO, {"client": client, "taken": dict(taken)}))
        try:
            await self._welcomed
        except BaseException:
            self.close()
            raise

    @classmethod
    async def _reach(cls, path: Path) -> Channel:
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, channel = await loop.create_unix_connection(cls, str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_RETRY)
            except OSError as error:
                raise Unavailable(f"cannot connect to the supervisor behind {path}: {error.strerror}") from error
            else:
                return channel

    async def start(self, spec: ProcessSpec) -> ChannelProcess:
        """Start a process tree (:meth:`worker.engine.Machine.start`). Cancelling this call ends what it may have started.

        Raises:
            TooLarge: the spec exceeds 32 MiB.
            Conflict: a process with this id exists already.
            Unavailable: the machine is gone, or being stopped.
        """
        body = msgspec.json.encode(spec)
        if len(body) > protocol.MAX_FRAME:
            raise TooLarge(f"the start of {spec.id} takes {len(body)} bytes; the limit is {protocol.MAX_FRAME}")
        process = ChannelProcess(self, spec.id, self._next)
        self._send_acknowledgements()  # first, or the id of a process that is over would still be taken
        self.write(protocol.frame(protocol.START, process.number, 0, body))
        self._next += 1
        self._processes[process.number] = process
        try:
            await process.started
            await self._writable.wait()
        except asyncio.CancelledError:
            process.abandon()
            raise
        return process

    def make_template(self, template: Template, patience: float = IMPORT_PATIENCE) -> None:
        """Have a process made that others can be forked from, before they are wanted; one that cannot be is not missed."""
        body = msgspec.to_builtins(template) | {"patience": patience}
        self.write(protocol.json_frame(protocol.TEMPLATE, body))

    def stop(self, grace: float) -> None:
        """Have the supervisor end every process, then itself; :meth:`wait_lost` tells when that has happened."""
        if not self.lost:
            self.write(protocol.json_frame(protocol.STOP, {"grace": max(0.0, grace)}))

    async def wait_lost(self) -> str:
        """Return, with the reason, when the connection has ended."""
        return await asyncio.shield(self._ended)

    def close(self, reason: str = "the worker closed the connection") -> None:
        """Hang up, having acknowledged what was taken. The processes go on, for another client to take over."""
        self.blame(reason)
        self._send_acknowledgements()
        if self._transport is not None:
            self._transport.abort()

    @property
    def busy(self) -> bool:
        """Whether there is a process here, so that something is to be expected of the supervisor."""
        return bool(self._processes)

    def ping(self) -> None:
        """Have the supervisor say something: :attr:`heard` rises."""
        self.write(protocol.frame(protocol.PING, 0))

    def blame(self, reason: str) -> None:
        """Say why the connection is about to end, unless somebody has said so before."""
        self._reason = self._reason or reason

    def gone(self) -> Unavailable:
        """The error of whoever still wants something from this machine."""
        return Unavailable(f"the machine is gone: {self.lost}")

    # For the processes

    def write(self, frame: bytes) -> None:
        """Queue a frame.

        Raises:
            Unavailable: the connection has ended.
        """
        if self.lost or self._transport is None:
            raise self.gone()
        self._transport.write(frame)

    def acknowledge(self, process: ChannelProcess) -> None:
        """Tell the supervisor what has been taken, when it is much or the end: each time would wake it for nothing."""
        if self.lost:
            return
        self._unacknowledged[process.number] = process
        if process.owing and not self._acknowledging:
            self._acknowledging = True
            asyncio.get_running_loop().call_soon(self._send_acknowledgements)
        if process.over:
            self._processes.pop(process.number, None)

    def _send_acknowledgements(self) -> None:
        self._acknowledging = False
        if self._unacknowledged and not self.lost:
            frames = [protocol.frame(protocol.ACK, p.number, p.taken) for p in self._unacknowledged.values()]
            self.write(b"".join(frames))
            for process in self._unacknowledged.values():
                process.acknowledged()
        self._unacknowledged.clear()

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101
        self._transport = transport

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  (the buffer is what it is)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += 1
        try:
            for kind, number, sequence, body in self._reader.feed(self._buffer[:nbytes]):
                self._receive(kind, number, sequence, body)
        except (protocol.ProtocolError, ValueError, LookupError, TypeError, RecursionError, struct.error) as error:
            self.close(f"the supervisor broke the protocol: {error!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self._reason or (str(exc) if exc else "the supervisor ended")
        self._writable.set()
        self._ended.set_result(self.lost)
        if not self._welcomed.done():
            self._welcomed.set_exception(self.gone())
            self._welcomed.exception()
        for process in self._processes.values():
            process.lose(self.lost)
            process.close(str(self.gone()))
        self._processes.clear()

    def _receive(self, kind: int, number: int, sequence: int, body: bytes) -> None:
        if kind == protocol.WELCOME:
            self._welcome(json.loads(body))
        elif kind == protocol.BYE:
            self._reason = str(json.loads(body)["reason"])
        elif number in self._processes:
            process = self._processes[number]
            if sequence:
                process.deliver(sequence, _frame(kind, body), len(body))
            else:
                self._answer(process, kind, body)

    def _welcome(self, body: dict[str, Any]) -> None:
        if body["version"] != protocol.VERSION:
            raise protocol.ProtocolError(f"it speaks version {body['version']}, not {protocol.VERSION}")
        self.pid = body["pid"]
        self._next = body["next"]
        for known in body["processes"]:
            process = ChannelProcess(self, known["id"], known["number"], known["taken"])
            process.started.set_result(None)
            self.attached[process.id] = self._processes[process.number] = process
        self._welcomed.set_result(None)

    def _answer(self, process: ChannelProcess, kind: int, body: bytes) -> None:
        if kind == protocol.SENT:
            process.sent(json.loads(body).get("error"))
        elif kind == protocol.TAKEN:
            process.taken_input(protocol.OFFSET.unpack(body)[0])
        elif kind == protocol.STARTED and not process.started.done():
            process.started.set_result(None)
        elif kind == protocol.REFUSED:
            del self._processes[process.number]
            refusal = json.loads(body)
            if not process.started.done():
                error = Conflict if refusal["code"] == "conflict" else Unavailable
                process.started.set_exception(error(refusal["message"]))


def _frame(kind: int, body: bytes) -> Frame:
    if kind in {protocol.STDOUT, protocol.STDERR}:
        (offset,) = protocol.OFFSET.unpack_from(body)
        stream: Literal["stdout", "stderr"] = "stdout" if kind == protocol.STDOUT else "stderr"
        return Output(stream, offset, body[protocol.OFFSET.size :])
    content = json.loads(body)
    if kind == protocol.MESSAGE and isinstance(content, dict):
        return Message(content)
    if kind == protocol.EXITED:
        return msgspec.convert(content, Exited)
    raise protocol.ProtocolError(f"a frame of the unknown kind {kind}")
