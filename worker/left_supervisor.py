"""A supervisor process that an earlier worker has started: what a child process offers, for one that is nobody's child here."""

from __future__ import annotations

import asyncio
import os
import signal


class LeftSupervisor:
    """Watches over the process ``pid`` until it has ended; how it ended only its parent would know."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError when there is no such process."""
        self.pid = pid
        self.returncode: int | None = None
        self._handle = os.pidfd_open(pid)
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._handle, self._note_end)

    def _note_end(self) -> None:
        self.returncode = 0
        self._ended.set_result(0)
        self.close()

    async def wait(self) -> int:
        """Return when it has ended; always 0."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self._handle >= 0:
            signal.pidfd_send_signal(self._handle, signal.SIGTERM)

    def close(self) -> None:
        """Watch no more."""
        if self._handle >= 0:
            asyncio.get_running_loop().remove_reader(self._handle)
            os.close(self._handle)
            self._handle = -1
