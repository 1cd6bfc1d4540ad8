"""Keeps what a worker has taken from being given to others, and ends what was taken from it all the same."""

from __future__ import annotations

import asyncio
import logging

import nats.errors
import nats.js.errors

from bus import topology
from bus.log import RUN, Log
from helmr.errors import HelmrError
from worker.dispatches import Dispatches
from worker.execs import Execs
from worker.execution import Execution
from worker.executions import Executions
from worker.hot import HotRun, HotRuns
from worker.run_journal import Fenced

log = logging.getLogger(__name__)

#: Lease checks under way at the same time: they are only a precaution.
_CHECKS = 8


class LeaseWatch:
    """Looks after the messages, leases and execs of one worker; run :meth:`watch` in a task of its own."""

    def __init__(
        self,
        event_log: Log,
        dispatches: Dispatches,
        executions: Executions,
        hot: HotRuns,
        execs: Execs,
        *,
        worker_id: str,
    ) -> None:
        self._log = event_log
        self._dispatches = dispatches
        self._executions = executions
        self._hot = hot
        self._execs = execs
        self._worker_id = worker_id

    async def watch(self) -> None:
        """Keep our messages from being delivered again, and make sure that our leases are still ours, for ever."""
        while True:
            await asyncio.sleep(topology.HEARTBEAT)
            try:
                await self._dispatches.keep()
                await self._check_leases()
                await self._execs.check()
            except (HelmrError, nats.errors.Error, nats.js.errors.Error, TimeoutError) as error:
                log.warning("heartbeat: %s: %s", type(error).__name__, error)

    async def _check_leases(self) -> None:
        limit = asyncio.Semaphore(_CHECKS)
        await asyncio.gather(*(self._check(execution, limit) for execution in self._executions.each()))
        await asyncio.gather(*(self._check_hot(run, limit) for run in self._hot.each()))

    async def _check(self, execution: Execution, limit: asyncio.Semaphore) -> None:
        async with limit:
            try:
                await execution.journal.check()
            except Fenced as fenced:
                execution.stop(fenced)

    async def _check_hot(self, run: HotRun, limit: asyncio.Semaphore) -> None:
        """The news that a waiting run has ended, or goes on elsewhere, may have been missed."""
        async with limit:
            state = (await self._log.present(RUN, run.scope, run.run_id)).state
            if state.terminal or (state.lease is not None and state.lease.worker != self._worker_id):
                await self._hot.park(run.run_id)
