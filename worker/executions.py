"""The runs that a worker executes: each from its lease until it has ended, waits, or is back in the queue."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from bus.queueing import lane_of, redispatch
from helmr.subjects import Scope
from worker.ending import HandedBack
from worker.execution import Execution
from worker.intake import Intake
from worker.liveness import Liveness
from worker.run_journal import Fenced
from worker.services import Services

log = logging.getLogger(__name__)


class Executions:
    """What one worker of a group is executing."""

    def __init__(self, services: Services, liveness: Liveness, intake: Intake, *, worker_id: str, group: str) -> None:
        self._services = services
        self._liveness = liveness
        self._intake = intake
        self._worker_id = worker_id
        self._group = group
        self._executions: dict[str, Execution] = {}
        self._ended = asyncio.Event()
        self._stopping = False
        #: Set when no machine of the worker is left: what it hands back while it drains is queued only then.
        self.machines_gone = asyncio.Event()

    def __len__(self) -> int:
        return len(self._executions)

    def each(self) -> list[Execution]:
        """All of them, as of now."""
        return list(self._executions.values())

    def get(self, run_id: str) -> Execution | None:
        """The execution of a run, if it is here."""
        return self._executions.get(run_id)

    def count(self) -> Counter[tuple[str, ...]]:
        """How many runs are being executed, by project, environment and task."""
        return Counter((*each.scope, each.spec.task_id) for each in self._executions.values())

    async def execute(self, execution: Execution, dispatch: int | None) -> None:
        """See a run to its end, which was leased as of the event ``dispatch``.

        Raises:
            Fenced: the lease was lost; nothing was said about it.
        """
        run_id = execution.run_id
        self._executions[run_id] = execution
        try:
            if self._stopping:
                execution.stop(HandedBack("the worker was stopped"))
            await execution.run()
        finally:
            if self._executions.get(run_id) is execution:  # else we were fenced, and have leased it again
                del self._executions[run_id]
            self._ended.set()
        if execution.handed_back:
            await self._requeue(execution.scope, run_id, dispatch)

    async def end_former(self, run_id: str) -> None:
        """End what we executed of a run until it was taken from us; it may be back before we have noticed."""
        former = self._executions.get(run_id)
        if former is not None and former.waits:  # all that it had to do is done, and its process is kept for us
            del self._executions[run_id]
        elif former is not None:
            former.stop(Fenced(f"run {run_id} was taken from us, and has come back"))
            await self._until(lambda: run_id not in self._executions)

    async def wait_none(self) -> None:
        """Return when nothing is being executed."""
        await self._until(lambda: not self._executions)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._ended.clear()
            await self._ended.wait()

    def stop(self) -> None:
        """Hand back all that is being executed, and all that begins from now on."""
        self._stopping = True
        for execution in self.each():
            execution.stop(HandedBack("the worker was stopped"))

    def end_cut_off(self) -> None:
        """End all at once, before others may have it; the server hears of it when it can hear us again."""
        if self._executions:
            log.warning("the server cannot be reached: ending %s runs", len(self._executions))
        for execution in self._executions.values():
            execution.stop(HandedBack("its worker could not reach the server", grace=0.0))

    async def _requeue(self, scope: Scope, run_id: str, dispatch: int | None) -> None:
        """Queue a run again that was handed back; when we take nothing any more, only once our machines are gone."""
        alive = self._liveness.alive()
        if self._intake.draining:
            await self.machines_gone.wait()
            alive.discard(self._worker_id)
        lane = await lane_of(self._services.log, scope, run_id, group=self._group, alive=alive)
        await redispatch(self._services.log, scope, run_id, dispatch=dispatch, lane=lane)
