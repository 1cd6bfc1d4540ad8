"""Asking about workspaces, and stopping them."""

from __future__ import annotations

import msgspec
import nats.errors

from bus.log import WORKSPACE, Log
from bus.presence import Presence
from bus.services.endpoint import Endpoint
from helmr import errors, subjects
from helmr.errors import TimedOut
from helmr.models import Workspace, workspace_record
from helmr.reducers import workspace as rules
from helmr.subjects import Scope

#: Seconds a worker gets to stop a machine.
_STOP_TIMEOUT = 30.0


class WorkspaceRef(msgspec.Struct, kw_only=True):
    """A request that names a workspace."""

    id: str


class StopOrder(msgspec.Struct, kw_only=True):
    """What control asks of the worker a workspace is live on."""

    project: str
    environment: str
    id: str


class Workspaces:
    """The workspace service."""

    def __init__(self, log: Log, presence: Presence) -> None:
        self.log = log
        self.presence = presence

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("workspace", "get", WorkspaceRef, self.get),
            Endpoint("workspace", "stop", WorkspaceRef, self.stop),
            Endpoint("workspace", "delete", WorkspaceRef, self.delete),
        ]

    async def get(self, scope: Scope, request: WorkspaceRef) -> Workspace:
        """One workspace."""
        event = await self.log.present(WORKSPACE, scope, request.id)
        return workspace_record(*scope, event.state)

    async def stop(self, scope: Scope, request: WorkspaceRef) -> Workspace:
        """End the container of a workspace; its files stay. Stopping a stopped one is fine.

        Raises:
            Conflict: a run or an exec is in it.
        """
        state = (await self.log.present(WORKSPACE, scope, request.id)).state
        live = state.materialization
        if live is not None:
            if self.presence.is_alive(live.worker):
                await self._ask(
                    live.worker, StopOrder(project=scope.project, environment=scope.environment, id=state.id)
                )
            await self.log.transact(
                WORKSPACE, scope, request.id, lambda s: rules.stop(s, worker=live.worker, reason="stopped on request")
            )
        return await self.get(scope, request)

    async def delete(self, scope: Scope, request: WorkspaceRef) -> Workspace:
        """Delete a workspace: its container, its files on the host if a worker is there, and in time its versions.

        Raises:
            Conflict: a run or an exec is in it.
        """
        await self.stop(scope, request)
        host = (await self.log.present(WORKSPACE, scope, request.id)).state.host
        position = await self.log.transact(WORKSPACE, scope, request.id, rules.delete)
        worker = next((each.id for each in self.presence.alive().values() if each.host == host), None)
        if worker is not None:
            order = StopOrder(project=scope.project, environment=scope.environment, id=request.id)
            await self._ask(worker, order, verb="delete")
        return workspace_record(*scope, position.state)

    async def _ask(self, worker: str, order: StopOrder, *, verb: str = "stop") -> None:
        try:
            subject = subjects.worker(worker, verb)
            reply = await self.log.nc.request(subject, msgspec.json.encode(order), timeout=_STOP_TIMEOUT)
        except (TimeoutError, nats.errors.Error) as error:
            raise TimedOut(f"worker {worker} does not answer", hint="see `helmr status`; try again") from error
        answer = msgspec.json.decode(reply.data)
        if "error" in answer:
            raise errors.from_dict(answer["error"])
