"""Which worker an exec is for: the one its workspace is live on, else one on the host of its files, else any that may."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from bus.log import WORKSPACE, Log
from bus.presence import Presence, WorkerInfo
from bus.queueing import DEFAULT_GROUP
from helmr.errors import Conflict, Unavailable
from helmr.events import WorkspaceState
from helmr.reducers import workspace as rules
from helmr.subjects import Scope


class Place(NamedTuple):
    """The worker for a workspace, and how that is."""

    worker: str
    workspace: WorkspaceState


class Placement:
    """Chooses workers by what the log and their presence say."""

    def __init__(self, log: Log, presence: Presence) -> None:
        self._log = log
        self._presence = presence

    async def find(self, scope: Scope, workspace_id: str) -> Place:
        """The worker to bring the workspace to life, or that has it.

        Raises:
            NotFound: no such workspace.
            Conflict: it is deleted.
            Unavailable: no worker may take it.
        """
        state: WorkspaceState = (await self._log.present(WORKSPACE, scope, workspace_id)).state
        if state.status == "deleted":
            raise Conflict(f"workspace {state.id} is deleted")
        live = state.materialization
        if live is not None and not await self._presence.confirm_gone(live.worker):
            return Place(live.worker, state)
        if state.host is not None and not self._fit(state):
            state = await self._unbind(scope, state)
        fit = self._fit(state)
        if not fit:
            raise _nobody(state)
        best = min(fit, key=lambda info: (bool(info.obstacle), info.running / info.slots, info.id))
        return Place(best.id, state)

    def _fit(self, state: WorkspaceState) -> list[WorkerInfo]:
        """Who may have a workspace that is live nowhere: who is at its files, else who has the walls it has lived between."""
        workers = self._presence.workers(rules.lane(state, group=DEFAULT_GROUP, alive=set()))
        return [info for info in workers if state.host is not None or state.isolated in {None, info.isolated}]

    async def _unbind(self, scope: Scope, state: WorkspaceState) -> WorkspaceState:
        """Have it go on from its latest version, if nobody is on its host, and somebody else may have it."""
        host, alive = state.host, self._presence.alive()
        if host is None or not self._presence.settled or any(info.host == host for info in alive.values()):
            return state
        if not self._fit(msgspec.structs.replace(state, host=None)):
            return state
        position = await self._log.transact(
            WORKSPACE, scope, state.id, lambda s: rules.unbind(s, host=host, alive=set(alive))
        )
        unbound: WorkspaceState = position.state
        return unbound


def _nobody(state: WorkspaceState) -> Unavailable:
    if state.host is None:
        return Unavailable(
            f"no worker can take workspace {state.id}", hint="start one with `helmr worker`; see `helmr status`"
        )
    return Unavailable(
        f"the files of workspace {state.id} are on host {state.host}, and no worker is there that takes anything",
        hint="start a worker on that host; see `helmr status`",
    )
