"""Making workspaces, asking about them, stopping and deleting them."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import nats.errors

from bus.declared import find_sandbox, find_task
from bus.deployments import Deployments
from bus.log import WORKSPACE, Log, Position
from bus.presence import Presence
from bus.services.endpoint import Endpoint
from bus.stored import Superseded
from helmr import errors, ids, subjects
from helmr.errors import TimedOut, UsageError
from helmr.models import Workspace, workspace_record
from helmr.reducers import workspace as rules
from helmr.subjects import Scope

#: Seconds a worker gets to stop a machine.
_STOP_TIMEOUT = 30.0


class WorkspaceRef(msgspec.Struct, kw_only=True):
    """A request that names a workspace."""

    id: str


class CreateRequest(msgspec.Struct, kw_only=True):
    """A new workspace, of the sandbox of a task, or of one by name; a retry repeats ``request_id``."""

    request_id: str
    task: str | None = None
    sandbox: str | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}


class UpdateRequest(WorkspaceRef, kw_only=True):
    """What is to be different: see :class:`helmr.reducers.workspace.Changes`; the sandbox is named as in a create."""

    tag: list[str] = []
    untag: list[str] = []
    metadata: dict[str, Any] = {}
    task: str | None = None
    sandbox: str | None = None


class StopOrder(msgspec.Struct, kw_only=True):
    """What control asks of the worker a workspace is live on."""

    project: str
    environment: str
    id: str


class Workspaces:
    """The workspace service."""

    def __init__(self, log: Log, presence: Presence, deployments: Deployments) -> None:
        self.log = log
        self.presence = presence
        self.deployments = deployments

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("workspace", "create", CreateRequest, self.create),
            Endpoint("workspace", "get", WorkspaceRef, self.get),
            Endpoint("workspace", "update", UpdateRequest, self.update),
            Endpoint("workspace", "stop", WorkspaceRef, self.stop),
            Endpoint("workspace", "delete", WorkspaceRef, self.delete),
        ]

    async def create(self, scope: Scope, request: CreateRequest) -> Workspace:
        """A new, empty workspace. The same request again finds the one it made.

        Raises:
            NotFound: nothing is deployed, or no such task or sandbox.
            TooLarge: too many tags, or too much metadata.
        """
        if not ids.is_id(request.request_id, "req"):
            raise UsageError(f"{request.request_id[:80]!r} is no request id", hint="use helmr.ids.new('req')")
        sandbox = self._sandbox(scope, request.task, request.sandbox)
        draft = rules.create(**sandbox, tags=request.tags, metadata=request.metadata)
        at_ms = ids.time_ms(request.request_id)
        workspace_id = ids.derive("ws", *scope, "create", request.request_id, at_ms=at_ms)
        with contextlib.suppress(Superseded):  # a retry: it stands already
            await self.log.append(WORKSPACE, scope, workspace_id, Position(0, None), draft)
        return await self.get(scope, WorkspaceRef(id=workspace_id))

    async def get(self, scope: Scope, request: WorkspaceRef) -> Workspace:
        """One workspace."""
        event = await self.log.present(WORKSPACE, scope, request.id)
        return workspace_record(*scope, event.state)

    async def update(self, scope: Scope, request: UpdateRequest) -> Workspace:
        """Change tags, metadata, or the sandbox: for another one it is stopped first, and has it from its next start on.

        Raises:
            Conflict: it is deleted; or a run or an exec is in it, and it would change its sandbox.
            NotFound: no such task or sandbox in the current deployment.
            TooLarge: too many tags, or too much metadata.
        """
        sandbox = None
        if request.task is not None or request.sandbox is not None:
            sandbox = self._sandbox(scope, request.task, request.sandbox)
        changes = rules.Changes(
            tag=tuple(request.tag), untag=tuple(request.untag), metadata=request.metadata, sandbox=sandbox
        )
        state = (await self.log.present(WORKSPACE, scope, request.id)).state
        if sandbox is not None and state.status == "active" and rules.needs_stop(state, sandbox):
            await self.stop(scope, request)
        position = await self.log.transact(WORKSPACE, scope, request.id, lambda state: rules.update(state, changes))
        return workspace_record(*scope, position.state)

    def _sandbox(self, scope: Scope, task: str | None, name: str | None) -> dict[str, str]:
        """A sandbox of the current deployment, as the log has it of a workspace."""
        if (task is None) == (name is None):
            raise UsageError("say which sandbox to make it from", hint="by its name, or by a task that uses it")
        deployment = self.deployments.current(scope)
        found = find_sandbox(deployment, str(name) if task is None else find_task(deployment, task)["sandbox"])
        return {
            "sandbox": found["name"],
            "fingerprint": found["fingerprint"],
            "deployment_id": deployment.id,
            "mount_path": found["mount_path"],
        }

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
