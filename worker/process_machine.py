"""A machine that is a supervisor process: this worker's child, or one that a dead worker has left."""

from __future__ import annotations

import asyncio
import contextlib
import signal

from helmr.guest import tree
from worker.channel import Channel
from worker.left_supervisor import LeftSupervisor
from worker.machine_folder import MachineFolder
from worker.machine_record import MachineRecord
from worker.supervised_machine import STOP_MARGIN, SupervisedMachine

Supervisor = asyncio.subprocess.Process | LeftSupervisor


class ProcessMachine(SupervisedMachine):
    """A supervisor process and the folder it works in (:class:`worker.engine.Machine`)."""

    def __init__(self, record: MachineRecord, process: Supervisor, channel: Channel, folder: MachineFolder) -> None:
        super().__init__(record, str(process.pid), channel, folder)
        self._process = process

    async def wait_lost(self) -> str:
        """Return, with the reason, when the supervisor has ended or hung up."""
        reason = await self._channel.wait_lost()
        with contextlib.suppress(TimeoutError):
            code = await asyncio.wait_for(self._process.wait(), 1.0)
            if code < 0:
                return f"the supervisor was ended by {signal.Signals(-code).name}"
        return reason

    async def _kill(self) -> None:
        await reap(self._process)

    async def _end(self, grace: float) -> None:
        if self._channel.lost and self._process.returncode is None:
            self._process.terminate()  # another worker took over, or it hung up: SIGTERM it still obeys
        self._channel.stop(grace)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace + STOP_MARGIN)

    async def _remove(self) -> None:
        await reap(self._process)
        await asyncio.to_thread(self.folder.remove)


async def reap(process: Supervisor) -> None:
    """End a supervisor that has not ended by itself, with all that is below it, and wait for it."""
    if process.returncode is None:
        await asyncio.to_thread(tree.kill, [process.pid])
    await process.wait()
