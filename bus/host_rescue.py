"""Moves what is queued for a host whose workers are all gone: its workspaces go on elsewhere, from their latest versions.

A workspace stays bound to its host as long as a worker is there, because its files are; and for good when files of it could
not be stored. Between hosts with walls and hosts without it never moves.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from bus.live import LiveRun, LiveRuns
from bus.log import RUN, WORKSPACE, Log
from bus.presence import Presence
from bus.queueing import DEFAULT_GROUP
from helmr.errors import Conflict, NotFound
from helmr.events import Draft, WorkspaceState
from helmr.reducers import workspace as rules

log = logging.getLogger(__name__)


class HostRescue:
    """What :class:`bus.rescue.Rescue` does about hosts; ``move`` queues a run anew where it belongs by then."""

    def __init__(
        self, event_log: Log, presence: Presence, live: LiveRuns, move: Callable[[LiveRun], Awaitable[None]]
    ) -> None:
        self.log = event_log
        self.presence = presence
        self.live = live
        self._move = move

    async def look(self) -> None:
        """Move every run that waits for a dead host and need not."""
        hosts = {info.host for info in self.presence.alive().values()}
        queued = [run for run in self.live if run.state.status == "queued" and run.state.dispatch is not None]
        for run in queued if hosts else []:
            lane = run.state.lane or ""
            if lane[:1] == "~" and lane[1:] not in hosts:
                await self._rescue(run, lane[1:])

    async def _rescue(self, run: LiveRun, host: str) -> None:
        try:
            workspace_id = (await self.log.present(RUN, run.scope, run.id)).state.workspace_id
            workspace = await self.log.transact(
                WORKSPACE, run.scope, workspace_id, lambda state: self._unbind(state, host)
            )
            if workspace.state.host != host:
                log.info("workspace %s goes on without host %s", workspace_id, host)
                await self._move(run)
        except (Conflict, NotFound) as error:
            log.debug("moot: %s", error)

    def _unbind(self, state: WorkspaceState, host: str) -> Draft | None:
        present = [info for info in self.presence.alive().values() if info.group == DEFAULT_GROUP]
        if {info.isolated for info in present} != {state.isolated} or any(info.host == host for info in present):
            return None
        return rules.unbind(state, host=host, alive={info.id for info in present})
