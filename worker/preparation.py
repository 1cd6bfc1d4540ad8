"""Gets together what a run needs before its process can start: secrets, payload, and the machine of its workspace.

A cancel or the run's deadline may come before all that is there: then nothing is begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import msgspec

from bus.services.secrets import ReleaseRequest
from helmr.errors import Conflict
from helmr.events import RunSpec
from helmr.subjects import Scope
from worker import large_values, run_secrets
from worker.ending import Ending
from worker.engine import Machine
from worker.machine_maker import Needs
from worker.run_journal import RunJournal
from worker.run_secrets import RunSecrets
from worker.services import Services
from worker.unless import unless

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that it may take to have a machine only for the sake of ending an earlier one: somebody waits for the run's end.
_REPLACE_TIME = 10.0


class BrokenOff(Exception):
    """The run was cancelled, or its time was up, before everything was there."""


class Preparation:
    """What one execution has so far of what it needs."""

    def __init__(self, services: Services, scope: Scope, spec: RunSpec, journal: RunJournal, ending: Ending) -> None:
        self._services = services
        self._scope = scope
        self._spec = spec
        self._journal = journal
        self._ending = ending
        self.secrets = run_secrets.NONE
        self.payload: Any = spec.payload

    async def fetch_secrets(self, declared: list[dict[str, Any]], deadline: float) -> None:
        """Have the secrets that the task declares.

        Raises:
            BrokenOff: a cancel or the deadline came first.
            SecretMissing: one is gone, or cannot be decrypted.
            Fenced: the lease is lost.
        """
        self.secrets = await self._in_time(self._place_secrets(declared), deadline)

    async def _place_secrets(self, declared: list[dict[str, Any]]) -> RunSecrets:
        return run_secrets.place(declared, await self.secret_values())

    async def secret_values(self) -> dict[str, str]:
        """The values of all secrets that the run may have, its image's and its task's.

        Raises:
            SecretMissing: one is gone, or cannot be decrypted.
            Fenced: the lease is lost.
        """
        lease = self._journal.lease
        request = ReleaseRequest(run_id=self._journal.state.id, worker=lease.worker, lease=lease.cursor)
        try:
            return await run_secrets.fetch(self._services.log.nc, self._scope, request)
        except Conflict:
            await self._journal.check()
            raise

    async def fetch_payload(self, deadline: float) -> None:
        """Have the payload also if it is a large one.

        Raises:
            BrokenOff: a cancel or the deadline came first.
        """
        reference = self._spec.payload_artifact
        if reference is not None:
            self.payload = msgspec.Raw(
                await self._in_time(large_values.fetch(self._services.values, reference), deadline)
            )

    async def enter(self, use: AbstractAsyncContextManager[Machine], needs: Needs, deadline: float) -> Machine:
        """The machine of the workspace, which is in ``use`` from then on.

        Raises:
            BrokenOff: a cancel or the deadline came first.
            Misplaced, HelmrError: see :meth:`worker.machines.Machines.use`.
        """
        if self._services.machines.at_hand(self._scope, self._spec.workspace_id, needs.deployment):
            return await use.__aenter__()  # at once: there is nothing to be cancelled
        return await self._in_time(use.__aenter__(), deadline)

    async def replace_former(self, needs: Needs) -> None:
        """Prepare the machine all the same: what an earlier holder left running ends with its own, in whose place it comes."""
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(_REPLACE_TIME),
                self._services.machines.use(self._scope, self._spec.workspace_id, needs),
            ):
                log.debug("run %s: nothing of it is left in its workspace", self._journal.state.id)

    async def _in_time(self, work: Coroutine[Any, Any, T], deadline: float) -> T:
        left = max(deadline - asyncio.get_running_loop().time(), 0)
        done = await unless(self._ending.cancelled, work, left)
        if done is None:
            raise BrokenOff
        return done
