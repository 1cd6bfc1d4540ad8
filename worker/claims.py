"""The claims of one worker on workspaces: each is made in the log before a machine exists, and given up in the log after.

That keeps two workers from bringing one workspace to life twice: the loser of the compare-and-set learns where the workspace
is, and sends the run there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from bus.log import WORKSPACE, Log
from helmr.errors import Conflict, HelmrError
from helmr.events import Draft, WorkspaceState
from helmr.reducers import workspace as rules
from helmr.subjects import Scope
from worker.liveness import Liveness
from worker.run_journal import STALE

log = logging.getLogger(__name__)


class Misplaced(Exception):
    """The workspace is, or its files are, somewhere this worker cannot use them; ``lane`` is where the run belongs."""

    def __init__(self, lane: str) -> None:
        super().__init__(f"the run belongs in lane {lane}")
        self.lane = lane


class _Ahead:
    """A claim that is made before anybody asks for it."""

    def __init__(self, claiming: asyncio.Task[WorkspaceState]) -> None:
        self.claiming = claiming
        self._began = asyncio.get_running_loop().time()

    def is_fresh(self) -> bool:
        """Whether nobody can have taken it away since."""
        return asyncio.get_running_loop().time() - self._began <= STALE


class Claims:
    """Makes, looks after and gives up what ``worker_id`` of a host and a group has of workspaces."""

    def __init__(
        self, event_log: Log, liveness: Liveness, *, worker_id: str, host: str, isolated: bool, group: str
    ) -> None:
        self._log = event_log
        self._liveness = liveness
        self._worker_id = worker_id
        self._host = host
        self._isolated = isolated
        self._group = group
        self._ahead: dict[tuple[Scope, str], _Ahead] = {}

    @contextlib.asynccontextmanager
    async def ahead(self, scope: Scope, workspace_id: str) -> AsyncIterator[None]:
        """For the length of a block: :meth:`claim` will most likely be called, and is made in the meantime; else given up."""
        key = (scope, workspace_id)
        if key in self._ahead:
            yield
            return
        ahead = self._ahead[key] = _Ahead(asyncio.create_task(self._claim(scope, workspace_id)))
        try:
            yield
        finally:
            if self._ahead.get(key) is ahead:
                del self._ahead[key]
                await asyncio.shield(self._withdraw(scope, workspace_id, ahead))

    async def _withdraw(self, scope: Scope, workspace_id: str, ahead: _Ahead) -> None:
        try:
            await ahead.claiming
        except (Misplaced, HelmrError) as error:
            log.debug("workspace %s: %s", workspace_id, error)
        else:
            await self.give_up(scope, workspace_id, "what it was wanted for did not begin here")

    async def claim(self, scope: Scope, workspace_id: str) -> WorkspaceState:
        """Make the workspace live here; how it is now.

        Raises:
            Misplaced: another worker has it, or another host its files.
            Conflict: it is deleted.
        """
        ahead = self._ahead.pop((scope, workspace_id), None)
        if ahead is not None:
            state = await ahead.claiming
            if ahead.is_fresh():
                return state
        return await self._claim(scope, workspace_id)

    async def _claim(self, scope: Scope, workspace_id: str) -> WorkspaceState:
        def decide(state: WorkspaceState) -> Draft:
            live = state.materialization
            gone = live.worker if live and not self._liveness.is_alive(live.worker) else None
            return rules.materialize(
                state, worker=self._worker_id, host=self._host, ref="", evict=gone, isolated=self._isolated
            )

        try:
            position = await self._log.transact(WORKSPACE, scope, workspace_id, decide)
        except Conflict as error:
            state = (await self._log.present(WORKSPACE, scope, workspace_id)).state
            if state.status == "deleted":
                raise
            raise self.misplaced(state) from error
        claimed: WorkspaceState = position.state
        return claimed

    async def inherit(self, scope: Scope, workspace_id: str, *, former: str, ref: str) -> WorkspaceState:
        """Take a workspace over from a dead worker, together with the machine ``ref``; how it is now.

        Raises:
            Conflict: the log says that it is not live there any more.
        """
        position = await self._log.transact(
            WORKSPACE,
            scope,
            workspace_id,
            lambda state: rules.inherit(state, worker=self._worker_id, former=former, host=self._host, ref=ref),
        )
        state: WorkspaceState = position.state
        return state

    async def look(self, scope: Scope, workspace_id: str) -> WorkspaceState | None:
        """How the workspace is if another worker has claimed it meanwhile; None: it is still ours."""
        state: WorkspaceState = (await self._log.present(WORKSPACE, scope, workspace_id)).state
        live = state.materialization
        return None if live is not None and live.worker == self._worker_id else state

    def misplaced(self, state: WorkspaceState) -> Misplaced:
        """What is to be said of a workspace that is not ours."""
        return Misplaced(rules.lane(state, group=self._group, alive=self._liveness.alive()))

    async def give_up(self, scope: Scope, workspace_id: str, reason: str) -> None:
        """Say that the workspace is not live here any more."""
        try:
            await self._log.transact(
                WORKSPACE, scope, workspace_id, lambda state: rules.stop(state, worker=self._worker_id, reason=reason)
            )
        except HelmrError as error:
            # Presence will tell the others that we are gone; the claim can then be evicted.
            log.warning("workspace %s: cannot say that it is stopped: %s", workspace_id, error)
