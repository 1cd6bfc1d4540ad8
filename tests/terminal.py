"""A program on a terminal of its own, for tests of what only people see."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")
_PATIENCE = 30.0


class Terminal:
    """What is on the screen so far (``text``, without escape sequences), and a keyboard."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self.raw = ""
        self.process = process
        self._master = master
        self._seen = 0
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    @property
    def text(self) -> str:
        """All of the output, as a person reads it."""
        return _ESCAPES.sub("", self.raw)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._master)
        self.raw += data.decode("utf-8", "replace")
        self._more.set()

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    async def see(self, words: str) -> str:
        """Wait until ``words`` appear beyond what was seen before; what came up to there."""
        try:
            async with asyncio.timeout(_PATIENCE):
                while (at := self.text.find(words, self._seen)) < 0:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"{words!r} did not appear in {self.text[self._seen :]!r}") from None
        since, self._seen = self._seen, at + len(words)
        return self.text[since : self._seen]

    async def press(self, key: str, words: str) -> str:
        """Press a key until ``words`` appear: Python's readline misses a signal that comes just before it listens."""
        for _ in range(10):
            self.type(key)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE / 10):
                    return await self.see(words)
        return await self.see(words)

    async def end(self) -> int:
        """Wait for the program to end; its exit code."""
        return await asyncio.wait_for(self.process.wait(), _PATIENCE)

    def settings(self) -> list[object]:
        """The terminal's settings, to be compared."""
        return list(termios.tcgetattr(self._master))


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@asynccontextmanager
async def helmr_on_terminal(args: Sequence[str], env: Mapping[str, str], cwd: Path) -> AsyncIterator[Terminal]:
    """The program ``helmr`` on a terminal of 120 by 40; killed at the end if it lives still."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    root = str(Path(__file__).parent.parent)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *args),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=cwd,
        env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": root, **env},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    terminal = Terminal(master, process)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
