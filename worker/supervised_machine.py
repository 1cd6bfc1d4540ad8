"""What the machines of both engines have in common: a supervisor at the other end of a channel, a folder, and its record."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import msgspec

from worker import machine_record
from worker.channel import Channel, ChannelProcess
from worker.engine import ProcessSpec
from worker.machine_folder import MachineFolder
from worker.machine_record import MachineRecord
from worker.silence import end_when_silent

#: Seconds that an engine and a supervisor may take to end beyond the grace given to processes.
STOP_MARGIN = 3.0
#: Seconds in which a supervisor that has long been there must answer.
_REACH = 5.0


async def reach(folder: MachineFolder, worker_id: str) -> Channel:
    """The channel to a supervisor that another worker has left.

    Raises:
        Unavailable: it does not answer.
    """
    return await Channel.connect(folder.socket(), client=worker_id, ready_within=_REACH)


class SupervisedMachine(ABC):
    """A live workspace (:class:`worker.engine.Machine`); how it is ended is each engine's own."""

    def __init__(self, record: MachineRecord, ref: str, channel: Channel, folder: MachineFolder) -> None:
        self.workspace_id = record.workspace_id
        self.ref = ref
        self.adopted = False
        self.folder = folder
        self._record = record
        self._channel = channel
        self._stopping: asyncio.Task[None] | None = None
        self._minding = asyncio.create_task(end_when_silent(channel, self._kill))

    def sources(self) -> set[str]:
        """The names of the sources that were delivered."""
        return self.folder.sources_there()

    def claimed(self, claim: int) -> None:
        """Take note of the claim that the machine is kept under now."""
        self._note(claim=claim)

    def _note(self, **changes: Any) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        machine_record.write(self.folder.path, self._record)

    async def put_source(self, name: str, tree: Path) -> None:
        """Make a copy of the folder ``tree`` readable to tasks as source ``name``; doing it twice is free."""
        await self.folder.put_source(name, tree)

    async def start(self, spec: ProcessSpec) -> ChannelProcess:
        """Start a process tree; see :meth:`worker.engine.Machine.start`."""
        return await self._channel.start(spec)

    async def stop(self, grace: float = 2.0) -> None:
        """End every process and the machine itself; the files stay."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace: float) -> None:
        try:
            await self._end(grace)
        finally:
            self._minding.cancel()
            self._channel.close("the machine was stopped")
            await self._remove()

    @abstractmethod
    async def wait_lost(self) -> str:
        """Return, with the reason, when the machine has ended for whatever reason."""

    @abstractmethod
    async def _kill(self) -> None:
        """End it from outside: its supervisor does not answer."""

    @abstractmethod
    async def _end(self, grace: float) -> None:
        """Have it end, and wait for that, though not for ever."""

    @abstractmethod
    async def _remove(self) -> None:
        """Remove what is left of it, by force if need be."""
