"""Parts of Helmr as child processes: started, listened to, started again when they die, stopped in order.

A part says that it is ready with a line of its output. Its process group is its own, so that Ctrl-C reaches only the
program at the terminal, and the kernel ends it when its parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence

from bus.server import die_with_parent
from helmr.errors import HelmrError, Unavailable

log = logging.getLogger(__name__)

#: Seconds before a part that died is started again: at once, then ever later.
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
#: A part that lived so many seconds is not in a crash loop.
_HEALTHY = 10.0
#: Bytes of one line of output; the rest of a longer one becomes lines of its own.
_LINE = 64 * 1024
_LAST_WORDS = 8
#: Seconds that output may still come after the end: a child of the part may hold the pipe open.
_DRAIN = 0.5

Listener = Callable[[str], bool]


class Stop:
    """SIGINT, SIGTERM and SIGHUP as events: the first asks for an orderly stop, the second for a quick one, the third insists.

    ``last_resort`` seconds after the first the process ends, whatever is still going on: a stop must not hang.
    """

    def __init__(self, *, last_resort: float | None = None) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.insisted = asyncio.Event()
        self._last_resort = last_resort

    def listen(self) -> None:
        """Take the signals over from Python."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._heard)

    def _heard(self) -> None:
        if self._last_resort is not None and not self.asked.is_set():
            asyncio.get_running_loop().call_later(self._last_resort, _give_up)
        steps = (self.asked, self.hurried, self.insisted)
        next((step for step in steps if not step.is_set()), self.insisted).set()


def _give_up() -> None:
    log.error("it did not stop in time")
    os._exit(1)


async def first_of(*events: asyncio.Event) -> None:
    """Return when the first of these events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class PartFailed(HelmrError):
    """A part ended before it was ever ready; ``code`` is its exit code, ``words`` what it said last."""

    def __init__(self, name: str, code: int, words: Sequence[str]) -> None:
        message, hint = _last_error(words)
        super().__init__(message or f"{name} ended with exit code {code}: {' / '.join(words)}", hint=hint)
        self.exit_code = code if code > 0 else 1  # type: ignore[misc]


def _last_error(words: Sequence[str]) -> tuple[str | None, str | None]:
    """The error that a command of ours ended with, from its own words."""
    texts = list(words)
    begin = next((at for at in reversed(range(len(texts))) if texts[at].startswith("error: ")), None)
    if begin is None:
        return None, None
    told = "\n".join(texts[begin:])
    message, _, hint = told.removeprefix("error: ").partition("\nhint: ")
    return message, hint or None


class Part:
    """One child process that is meant to live; :meth:`run` keeps it alive until :meth:`stop`.

    ``command`` is asked anew at every start. ``listen`` gets every line the part writes, and returns True for the line
    that says it is ready. With ``fragile`` an end before it was ever ready is an error and no reason for another try.
    ``orphaned`` is the signal it gets when we are gone; ``died`` is told of every death that was not asked for.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        listen: Listener,
        *,
        fragile: bool = False,
        orphaned: int = signal.SIGTERM,
        died: Callable[[str], None] = log.warning,
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.ready = asyncio.Event()
        #: Set when it has been ready or has died: whoever waits for the first has waited long enough.
        self.tried = asyncio.Event()
        self.restarts = 0
        self._command = command
        self._listen = listen
        self._fragile = fragile
        self._orphaned = orphaned
        self._died = died
        self._env = env
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._was_ready = False

    @property
    def pid(self) -> int | None:
        """The process id, while there is a process."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Start the part, and start it again whenever it ends.

        Raises:
            PartFailed: it is fragile and was never ready.
        """
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            begin = loop.time()
            code = await self._live()
            if self._stopping.is_set():
                return
            if self._fragile and not self._was_ready:
                raise PartFailed(self.name, code, self._words)
            delay = FIRST_DELAY if loop.time() - begin > _HEALTHY else delay
            self._died(f"{self.name} ended ({_how(code)}); starting it again")
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, LONGEST_DELAY)

    async def stop(self, grace: float) -> None:
        """Ask the part to end, and kill it after ``grace`` seconds; :meth:`run` returns."""
        self._stopping.set()
        self.signal(signal.SIGTERM)
        process = self._process
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            log.warning("%s did not stop within %g s; killed", self.name, grace)
            self.signal(signal.SIGKILL)
            await process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the process, if there is one."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _live(self) -> int:
        """One life, from start to end; the exit code."""
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, self._orphaned),
        )
        reading = asyncio.create_task(self._read(process))
        try:
            code = await process.wait()
            await asyncio.wait({reading}, timeout=_DRAIN)
            return code
        finally:
            reading.cancel()
            self.signal(signal.SIGKILL)  # cancelled in the middle of its life
            self.ready.clear()
            self.tried.set()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise Unavailable(f"{self.name} has no output")
        pending = b""
        while data := await process.stdout.read(_LINE):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._hear(line)
            if len(pending) >= _LINE:
                self._hear(pending)
                pending = b""
        if pending:
            self._hear(pending)

    def _hear(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if self._listen(text):
            self._was_ready = True
            self.ready.set()
            self.tried.set()
        elif text:
            self._words.append(text)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
