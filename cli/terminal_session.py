"""A terminal in a workspace at the terminal of this program: raw both ways, resized with it, and put in order again at the end.

At the beginning of a line ``~`` is for us, as with ssh: ``~.`` ends the session, ``~d`` leaves it running, ``~?`` explains,
``~~`` is a ``~``.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.exec_session import write
from helmr.errors import Conflict, UsageError

if TYPE_CHECKING:
    from helmr.client.exec_handle import ExecHandle

_HELP = b"\r\n~.  end the session\r\n~d  leave it running, to be attached again\r\n~~  a ~\r\n"
_TIME_TO_END = (signal.SIGTERM, signal.SIGHUP)
_TILDE = ord("~")
_VARIABLES = ("TERM", "COLORTERM")


class Left(Exception):
    """The session goes on without us, as exec ``exec_id``."""

    def __init__(self, exec_id: str) -> None:
        super().__init__(exec_id)
        self.exec_id = exec_id


class Ended(Exception):
    """Somebody wants the end of the session, or is not there any more."""


def size() -> tuple[int, int]:
    """Rows and columns of this terminal.

    Raises:
        UsageError: it is none.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "a shell needs a terminal for input and output",
            hint="run a program with `helmr workspace exec WS -- COMMAND`",
        )
    columns, rows = os.get_terminal_size(1)
    return max(rows, 1), max(columns, 1)


def environment() -> dict[str, str]:
    """What a program needs to know about this terminal."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


class Escape(enum.Enum):
    """What somebody wants of this program, and not of the one in the workspace."""

    END = ord(".")
    LEAVE = ord("d")
    HELP = ord("?")


_ESCAPES = {each.value: each for each in Escape}


class Escapes:
    """Takes what is typed apart: what is for the program in the workspace, and what is for us."""

    def __init__(self) -> None:
        self._at_beginning = True
        self._escaped = False

    def take(self, typed: bytes) -> Iterator[bytes | Escape]:
        """What is for the program, and what is for us, in their order."""
        plain = bytearray()
        for byte in typed:
            if self._escaped and byte in _ESCAPES:
                self._escaped = False
                yield bytes(plain)
                plain.clear()
                yield _ESCAPES[byte]
            elif self._at_beginning and not self._escaped and byte == _TILDE:
                self._escaped = True
            else:
                plain += self._plain(byte)
        yield bytes(plain)

    def _plain(self, byte: int) -> bytes:
        held = b"~" if self._escaped and byte != _TILDE else b""
        self._escaped = False
        self._at_beginning = byte in b"\r\n"
        return held + bytes([byte])


async def converse(process: ExecHandle) -> int:
    """Be the terminal of a session until it has ended; returns its exit code.

    Raises:
        Left: it goes on.
        Ended: it is to end.
        HelmrError: it could not be started, or was lost.
    """
    loop = asyncio.get_running_loop()
    typed: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: the size has changed
    me = asyncio.current_task()
    with _raw():
        loop.add_reader(0, lambda: typed.put_nowait(os.read(0, 65536)))
        loop.add_signal_handler(signal.SIGWINCH, lambda: typed.put_nowait(None))
        for number in _TIME_TO_END:
            loop.add_signal_handler(number, lambda: me.cancel() if me else None)
        typing = asyncio.create_task(_pass_on(process, typed))
        showing = asyncio.create_task(_show(process))
        try:
            await asyncio.wait({typing, showing}, return_when=asyncio.FIRST_COMPLETED)
            if typing.done() and not showing.done():
                typing.result()
            await showing
        except asyncio.CancelledError as error:
            raise Ended from error
        finally:
            loop.remove_reader(0)
            for number in (signal.SIGWINCH, *_TIME_TO_END):
                loop.remove_signal_handler(number)
            typing.cancel()
            showing.cancel()
            await asyncio.wait({typing, showing})
    from helmr.client.execs import exit_code_of

    return exit_code_of(await process.wait())


async def _show(process: ExecHandle) -> None:
    async for chunk in process:
        await asyncio.to_thread(write, 1, chunk.data)


async def _pass_on(process: ExecHandle, typed: asyncio.Queue[bytes | None]) -> None:
    escapes = Escapes()
    with contextlib.suppress(Conflict):  # it has just ended
        while True:
            data = await typed.get()
            if data is None:
                await process.resize(*size())
                continue
            if not data:
                raise Ended  # the terminal is gone
            for part in escapes.take(data):
                await _heed(process, part)


async def _heed(process: ExecHandle, part: bytes | Escape) -> None:
    match part:
        case Escape.LEAVE:
            process.detached = True
            raise Left(process.id)
        case Escape.END:
            raise Ended
        case Escape.HELP:
            await asyncio.to_thread(write, 1, _HELP)
        case bytes() if part:
            await process.write(part)


@contextmanager
def _raw() -> Iterator[None]:
    """Have every key arrive as it is, and the terminal as it was at the end, whatever that is."""
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSAFLUSH)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
