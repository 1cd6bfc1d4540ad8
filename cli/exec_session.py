"""An exec at the terminal: its input and output are those of this program, and so are the signals it gets and its exit code.

Reading and writing may block, so both are done in threads: the connection must go on being served meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.output import note
from helmr.exec_frames import CHUNK

if TYPE_CHECKING:
    from helmr.client.exec_handle import ExecHandle

#: What is passed on; how often Ctrl-C is, before it ends the exec.
_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_MAX_INTERRUPTS = 3
_FILES = {"stdout": 1, "stderr": 2}


async def converse(process: ExecHandle, *, with_input: bool) -> int:
    """Be the exec's terminal until it has ended; returns its exit code.

    Raises:
        HelmrError: it could not be started, or was lost.
        KeyboardInterrupt: somebody insists on the end of it.
    """
    from helmr.client.execs import exit_code_of

    me = asyncio.current_task()
    with _signals_to(process, me):
        if with_input:
            _pass_input_on(process)
        try:
            async for chunk in process:
                await asyncio.to_thread(write, _FILES[chunk.stream], chunk.data)
            ended = await process.wait()
            if ended.exit_code is not None and ended.reason:
                note(f"{process.id}: {ended.reason}")
            return exit_code_of(ended)
        except asyncio.CancelledError as error:
            raise KeyboardInterrupt from error


def write(file: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


@contextmanager
def _signals_to(process: ExecHandle, me: asyncio.Task[object] | None) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    interrupts = 0

    def pass_on(number: int) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts >= _MAX_INTERRUPTS and me is not None:
            me.cancel()
        elif interrupts == _MAX_INTERRUPTS - 1:
            note("it was interrupted and goes on; once more ends it")
        sending.append(asyncio.ensure_future(process.signal(number)))

    sending: list[asyncio.Future[None]] = []
    for number in _PASSED:
        loop.add_signal_handler(number, pass_on, number)
    try:
        yield
    finally:
        for number in _PASSED:
            loop.remove_signal_handler(number)


def _pass_input_on(process: ExecHandle) -> None:
    """Read standard input in a thread of its own, which ends with this program, wherever it hangs."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        while data := os.read(0, CHUNK):
            if not _do(process.write(data)):
                return
        _do(process.end_input())

    def _do(work: object) -> bool:
        """Have it done by the loop; False if nobody takes input any more."""
        try:
            asyncio.run_coroutine_threadsafe(work, loop).result()  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001  (the exec has ended, or the loop: whoever reads its output says how)
            return False
        return True

    threading.Thread(target=read, name="stdin", daemon=True).start()
