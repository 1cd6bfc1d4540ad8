"""Why a run is to end before its process ends by itself, and the ending: a cancel, a full disk, or its worker's own reasons."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from helmr.errors import HelmrError
from helmr.events import RunState
from worker.disk_watch import overfull
from worker.engine import Process

log = logging.getLogger(__name__)

#: Seconds a process gets to end when the run is handed back or the lease is lost.
HURRY = 1.0


class HandedBack(Exception):
    """The worker stops, or cannot be heard: the run goes back to the queue, its processes ended within ``grace`` seconds."""

    def __init__(self, reason: str, *, grace: float = HURRY) -> None:
        super().__init__(reason)
        self.grace = grace


class Ending:
    """What is known of the end of one execution while it goes on."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._process: Process | None = None
        #: Set when somebody wants the run to be cancelled, and when that is to be by force.
        self.cancelled = asyncio.Event()
        self.forced = asyncio.Event()
        #: Set when the worker has a ``reason`` of its own.
        self.stopped = asyncio.Event()
        self.reason: BaseException | None = None
        #: Bytes in the workspace when they were found to be too many.
        self.overfull: int | None = None

    @property
    def asked(self) -> bool:
        """Whether the process is being ended from here."""
        return self.cancelled.is_set() or self.reason is not None or self.overfull is not None

    @property
    def has_process(self) -> bool:
        """Whether there is a process to be ended."""
        return self._process is not None

    def stop(self, reason: BaseException) -> None:
        """End the execution for a reason of the worker's own; the first one counts."""
        if self.reason is None:
            self.reason = reason
            self.stopped.set()

    def heed_cancel(self, state: RunState) -> None:
        """Take note of what a state of the run, heard live or read, says about its end."""
        if state.cancel is not None:
            self.cancelled.set()
            if state.cancel.force:
                self.forced.set()

    @contextlib.contextmanager
    def watch(self, process: Process, *, grace: float, files: Path, disk: int | None) -> Iterator[None]:
        """For the length of a block: end the process when the run is cancelled, or ``files`` take more than ``disk`` bytes."""
        self._process = process
        watchers = [asyncio.create_task(self._end_when_cancelled(grace))]
        if disk:
            watchers.append(asyncio.create_task(self._end_when_overfull(files, disk)))
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            self._process = None

    async def _end_when_cancelled(self, grace: float) -> None:
        await self.cancelled.wait()
        if not self.forced.is_set():
            await self.end_process(grace)
            await self.forced.wait()
        await self.end_process(0)

    async def _end_when_overfull(self, files: Path, limit: int) -> None:
        self.overfull = await overfull(files, limit)
        await self.end_process(0)

    async def end_in_a_hurry(self) -> None:
        """End the process as fast as the worker's reason demands."""
        await self.end_process(self.reason.grace if isinstance(self.reason, HandedBack) else HURRY)

    async def end_process(self, grace: float) -> None:
        """End the process tree, if there is one; killed after ``grace`` seconds."""
        if self._process is not None:
            try:
                await self._process.cancel(grace)
            except HelmrError as error:
                log.debug("run %s: %s", self._run_id, error)  # the machine is gone, and the process with it
