"""Captures a live workspace and says so in the log: what a run left is a version before the run's end is announced."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from bus.log import WORKSPACE, Log
from bus.packs import Snapshot
from bus.versions import Captured
from helmr import ids
from helmr.errors import Conflict, HelmrError, Unavailable
from helmr.reducers import workspace as rules
from helmr.subjects import Scope
from worker.checkouts import Checkouts, Record

log = logging.getLogger(__name__)

#: Seconds between tries while the artifact store is away.
_RETRY_DELAY = 1.0


class Occasion(NamedTuple):
    """Why a workspace is captured, and for which run."""

    reason: str
    run_id: str | None = None


class Captures:
    """The captures of one worker."""

    def __init__(self, event_log: Log, checkouts: Checkouts, worker_id: str) -> None:
        self._log = event_log
        self._checkouts = checkouts
        self._worker_id = worker_id

    async def capture(
        self, scope: Scope, workspace_id: str, record: Record, occasion: Occasion
    ) -> tuple[Record, str | None]:
        """The copy's record from now on, and why its files could not be stored, if so; waits while the store is away.

        A copy that has not changed costs a look at its files, and makes no version. What cannot be stored is marked: such a
        workspace stays on its host.
        """
        problem = self._checkouts.why_not
        if problem is None:
            try:
                return await self._capture(scope, workspace_id, record, occasion), None
            except HelmrError as error:
                problem = error.message
        await self._log.transact(
            WORKSPACE, scope, workspace_id, lambda s: rules.fail_capture(s, worker=self._worker_id, reason=problem)
        )
        return record, problem

    async def _capture(self, scope: Scope, workspace_id: str, record: Record, occasion: Occasion) -> Record:
        outcome = await self._store(workspace_id, record)
        if isinstance(outcome, Captured):
            return await self._announce(scope, workspace_id, record, outcome, occasion)
        return record if outcome is record.snapshot else Record(record.epoch, outcome)

    async def _store(self, workspace_id: str, record: Record) -> Captured | Snapshot:
        level = logging.WARNING
        while True:
            try:
                return await self._checkouts.capture(workspace_id, record)
            except Unavailable as error:
                log.log(level, "workspace %s cannot be captured yet: %s", workspace_id, error)
                level = logging.DEBUG
                await asyncio.sleep(_RETRY_DELAY)  # nothing tells us that the store is back

    async def _announce(
        self, scope: Scope, workspace_id: str, record: Record, captured: Captured, occasion: Occasion
    ) -> Record:
        version = ids.new("ver")
        try:
            await self._log.transact(
                WORKSPACE,
                scope,
                workspace_id,
                lambda state: rules.capture(
                    state, worker=self._worker_id, version=version, facts=captured.facts, **occasion._asdict()
                ),
            )
        except Conflict as error:
            log.info("no version of %s: %s", workspace_id, error)  # it is somebody else's by now
            return record
        fresh = Record(record.epoch, captured.snapshot)
        await self._checkouts.save(workspace_id, fresh)
        return fresh
