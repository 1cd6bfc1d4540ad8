"""Keeps the processes of waiting runs for a while, so that a run that is woken soon goes on where it is, in milliseconds.

Such a process holds memory, and nothing else: no lease, no slot. Ending it is always safe: the run's journal takes a new
process to the same place. That happens when nobody woke it in its time (``park_after``), when there are too many or memory is
short, when the run is ended, and when the worker is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from helmr.errors import Conflict, HelmrError
from helmr.events import RunSpec
from helmr.subjects import Scope
from worker.engine import Machine, Process
from worker.host import memory_is_short
from worker.machines import Machines

log = logging.getLogger(__name__)

#: The longest a process is kept, in seconds: a deadline must fit into what poll() takes.
MAX_PARK_AFTER = 86_400.0
#: Seconds in which a killed process tree is gone.
_KILL_TIME = 5.0
#: Seconds between looks at the machine's memory.
_LOOK = 2.0


@dataclass(kw_only=True)
class HotRun:
    """A run's process, and where it is. While the run waits: the question it waits for the answer of, and how long it is kept.

    ``use`` has been entered; whoever has the process leaves it. ``landed`` is up to where LOGS has everything it wrote. Without
    a question the run does not wait: its worker died, and the next lease, if it is the very next one (that after so many
    dispatches of the attempt), goes on with the process.
    """

    scope: Scope
    run_id: str
    spec: RunSpec
    process: Process
    machine: Machine
    use: AbstractAsyncContextManager[Machine]
    question: int = 0
    park_at: float = 0.0
    landed: int = 0
    dispatches: int = 0
    former: str = ""  #: the dead worker, as long as nobody has gone on with what it left

    @property
    def execution(self) -> int:
        """The cursor of the lease under which the process was started."""
        return execution_of(self.process.id)


class HotRuns:
    """The processes kept by one worker, at most ``limit``, and none while memory ``is_short``.

    Run :meth:`watch` in a task of its own.
    """

    def __init__(
        self,
        machines: Machines,
        *,
        limit: int,
        is_short: Callable[[], bool] = memory_is_short,
        look: float = _LOOK,
    ) -> None:
        self._machines = machines
        self._limit = limit
        self._is_short = is_short
        self._look = look
        self._runs: dict[str, HotRun] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._runs)

    def keep(self, run: HotRun) -> None:
        """Keep a process."""
        self._runs[run.run_id] = run
        self._changed.set()

    def take(self, run_id: str) -> HotRun | None:
        """The process of a run that goes on, if it is here."""
        return self._runs.pop(run_id, None)

    def execution(self, run_id: str) -> int:
        """The execution that a kept process belongs to; 0: none is kept."""
        run = self._runs.get(run_id)
        return run.execution if run is not None else 0

    def spec(self, run_id: str) -> RunSpec | None:
        """What a run was started with, if its process is here."""
        run = self._runs.get(run_id)
        return run.spec if run is not None else None

    def each(self) -> list[HotRun]:
        """All of them, as of now."""
        return list(self._runs.values())

    async def watch(self) -> None:
        """Park what has been kept for long enough, or is too much, for ever."""
        while True:
            self._changed.clear()
            await asyncio.gather(*(self.park(run.run_id) for run in self._due()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_look()):
                    await self._changed.wait()

    def _next_look(self) -> float | None:
        """Memory may become short at any time, and says nothing."""
        look = asyncio.get_running_loop().time() + self._look
        return min((look, *(run.park_at for run in self._runs.values()))) if self._runs else None

    def _due(self) -> list[HotRun]:
        oldest = sorted(self._runs.values(), key=lambda run: run.park_at)
        surplus = max(len(oldest) - self._limit, 0)
        if self._closed or (oldest and self._is_short()):
            surplus = len(oldest)
        now = asyncio.get_running_loop().time()
        return [run for number, run in enumerate(oldest) if run.park_at <= now or number < surplus]

    async def park(self, run_id: str) -> None:
        """End the process of a run, and its container if nobody else uses that. Nothing happens when it is not here."""
        run = self.take(run_id)
        if run is None:
            return
        await discard(run.process)
        await run.use.__aexit__(None, None, None)
        try:
            await self._machines.stop(run.scope, run.spec.workspace_id, "its run was parked")
        except Conflict:
            return  # somebody else uses it
        except HelmrError as error:
            log.warning("workspace %s: %s", run.spec.workspace_id, error)

    async def park_workspace(self, workspace_id: str) -> None:
        """Park the runs of one workspace."""
        for run in self.each():
            if run.spec.workspace_id == workspace_id:
                await self.park(run.run_id)

    async def close(self) -> None:
        """Park all, and from now on at once whatever is to be kept."""
        self._closed = True
        self._changed.set()
        await asyncio.gather(*(self.park(run.run_id) for run in self.each()))


def execution_of(process_id: str) -> int:
    """The cursor of the lease under which the process of a run was started: it is a part of its id."""
    return int(process_id.rpartition("-")[2])


async def discard(process: Process) -> None:
    """End a process whose frames nobody wants any more, and see to its end."""
    process.settle_as_taken()
    try:
        async with asyncio.timeout(_KILL_TIME):
            await process.cancel(0)
            async for _ in process.frames():
                pass
    except (HelmrError, TimeoutError) as error:
        log.warning("process %s: %s", process.id, error)
