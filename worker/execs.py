"""The execs of one worker: takes orders from control, has frames of clients delivered, and ends all of them when it stops."""

from __future__ import annotations

import asyncio
import logging

import nats.errors
from nats.aio.subscription import Subscription

from bus.deployments import Deployments
from bus.log import EXEC, Log
from bus.services.execs import ExecOrder, KillRequest
from helmr import subjects
from helmr.errors import NotFound, Unavailable
from helmr.events import ExecState
from helmr.reducers import exec as rules
from helmr.subjects import Scope
from worker.exec_run import HURRY, ExecRun
from worker.machines import Machines

log = logging.getLogger(__name__)


class Execs:
    """What is executed in workspaces beside runs."""

    def __init__(
        self,
        event_log: Log,
        deployments: Deployments,
        machines: Machines,
        *,
        worker_id: str,
    ) -> None:
        self._log = event_log
        self._deployments = deployments
        self._machines = machines
        self._worker_id = worker_id
        self._runs: dict[str, ExecRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._runs)

    async def accept(self, order: ExecOrder) -> ExecState:
        """Begin an exec, and say how it was created; one that has begun is left alone.

        Raises:
            Conflict: somebody else has created it.
            Unavailable: the worker takes nothing any more, or NATS is away.
        """
        if order.id not in self._runs:
            await self._begin(order)
        return await asyncio.shield(self._runs[order.id].created)

    async def _begin(self, order: ExecOrder) -> None:
        if self._closed:
            raise Unavailable(f"worker {self._worker_id} is stopping", hint="try again")
        run = self._runs[order.id] = ExecRun(
            self._log, self._deployments, self._machines, order, worker_id=self._worker_id
        )
        try:
            subject = subjects.exec_input(Scope(order.project, order.environment), order.id)
            subscription = await self._log.nc.subscribe(subject, cb=run.hear)
        except nats.errors.Error as error:
            del self._runs[order.id]
            raise Unavailable(f"worker {self._worker_id} cannot listen: {error}", hint="try again") from error
        task = asyncio.create_task(self._see(run, subscription))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def kill(self, request: KillRequest) -> None:
        """Signal an exec, or end all of it.

        Raises:
            NotFound: it is not here (any more).
        """
        run = self._runs.get(request.id)
        if run is None:
            raise NotFound(f"exec {request.id} is not on worker {self._worker_id}")
        if request.signal is None:
            run.end("it was killed on request", request.grace)
        else:
            run.signal(request.signal)

    async def check(self) -> None:
        """End those that were given up for lost while we could not be reached."""
        for run in list(self._runs.values()):
            state = (await self._log.present(EXEC, run.scope, run.id)).state
            if not state.live:
                run.end("it was given up for lost", 0)

    def refuse(self) -> None:
        """Begin nothing any more."""
        self._closed = True

    async def close(self) -> None:
        """End all, and begin nothing any more."""
        self.refuse()
        for run in list(self._runs.values()):
            run.end("its worker was stopped", HURRY)
        await self.wait_none()

    async def wait_none(self) -> None:
        """Return when nothing is being executed."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _see(self, run: ExecRun, subscription: Subscription) -> None:
        try:
            await run.run()
        except Exception:
            log.exception("exec %s: giving it up", run.id)
            reason = "its worker failed; the log of the worker says more"
            await self._log.transact(EXEC, run.scope, run.id, lambda state: rules.lose(state, reason=reason))
        finally:
            del self._runs[run.id]
            try:
                await subscription.unsubscribe()
            except nats.errors.Error as error:
                log.debug("exec %s: %s", run.id, error)  # the connection is gone, and the subscription with it
