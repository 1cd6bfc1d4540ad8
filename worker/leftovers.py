"""What dead workers of a home have left: the next one goes on with what lives, and removes what does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from helmr.errors import EngineUnavailable, HelmrError
from worker.engine import Engine, Inheritance
from worker.heir import Carried, Heir
from worker.liveness import Liveness
from worker.machines import Machines

log = logging.getLogger(__name__)

#: Seconds between looks for what dead workers left running.
_SWEEP = 30.0


class Leftovers:
    """Looks for them on behalf of one worker; ``engine_lost`` is told when the engine does not answer meanwhile."""

    def __init__(
        self,
        engine: Engine,
        liveness: Liveness,
        machines: Machines,
        *,
        worker_id: str,
        engine_lost: Callable[[EngineUnavailable], None],
    ) -> None:
        self._engine = engine
        self._liveness = liveness
        self._machines = machines
        self._worker_id = worker_id
        self._engine_lost = engine_lost

    async def inherit(self, heir: Heir, carry_on: Callable[[Carried], None]) -> None:
        """Take over the machines that are alive, and have the runs in them carried on."""
        left = await self._engine.inherit(self._worker_id, self._liveness.neighbours())
        await asyncio.gather(*(self._inherit(found, heir, carry_on) for found in left))

    async def _inherit(self, found: Inheritance, heir: Heir, carry_on: Callable[[Carried], None]) -> None:
        async with self._machines.inherit(found) as scope:
            if scope is None:
                return
            log.info("workspace %s is taken over from %s", found.machine.workspace_id, found.former)
            for carried in await heir.take(scope, found):
                carry_on(carried)

    async def remove(self, *, spare_running: bool = False) -> None:
        """Remove what was left running.

        Raises:
            EngineUnavailable, HelmrError: the engine is away, or refuses.
        """
        for ref in await self._engine.collect(self._liveness.neighbours(), spare_running=spare_running):
            log.info("removed %s, left by a worker that is gone", ref)

    async def look(self) -> None:
        """Remove what has ended, or be told why that is not possible now: a later look will do."""
        try:
            await self.remove(spare_running=True)
        except EngineUnavailable as error:
            self._engine_lost(error)
        except HelmrError as error:
            log.warning("looking for leftovers: %s", error)

    async def sweep(self) -> None:
        """Look every now and then, for ever."""
        while True:
            await asyncio.sleep(_SWEEP)
            await self.look()
