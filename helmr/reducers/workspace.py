"""The life of a workspace: created once, live on one worker at a time, and where its files are."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict
from helmr.events import Draft, Materialization, WorkspaceState


def apply(
    state: WorkspaceState | None, kind: str, data: dict[str, Any], at: datetime, *, workspace_id: str = ""
) -> WorkspaceState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow.
    """
    if state is None:
        if kind != "created":
            raise Conflict(f"the first event of a workspace is created, not {kind}")
        fixed = {"id": workspace_id, "status": "active", "cursor": 1, "created_at": at, "updated_at": at}
        return msgspec.convert({**data, **fixed}, WorkspaceState, strict=False)
    if state.status == "deleted":
        raise Conflict(f"workspace {state.id} is deleted", details={"status": "deleted"})
    base = msgspec.structs.replace(state, cursor=state.cursor + 1, updated_at=at)
    match kind:
        case "materialized":
            live = Materialization(worker=data["worker"], ref=data.get("ref", ""), at=at)
            return msgspec.structs.replace(base, materialization=live, host=data["host"])
        case "stopped":
            return msgspec.structs.replace(base, materialization=None)
        case "deleted":
            return msgspec.structs.replace(base, status="deleted", materialization=None, host=None)
        case _:
            raise Conflict(f"workspace {state.id}: {kind} cannot follow")


def create(*, sandbox: str, fingerprint: str, deployment_id: str, mount_path: str) -> Draft:
    """A new, empty workspace of a sandbox."""
    data = {"sandbox": sandbox, "fingerprint": fingerprint, "deployment_id": deployment_id, "mount_path": mount_path}
    return Draft(kind="created", data=data, message=f"created from sandbox {sandbox}")


def materialize(state: WorkspaceState, *, worker: str, host: str, ref: str, evict: str | None = None) -> Draft:
    """The workspace is live on ``worker``; ``evict`` names a worker that is known to be gone.

    Raises:
        Conflict: it is live elsewhere (``details["worker"]``), or its files are on another host (``details["host"]``).
    """
    live = state.materialization
    if live and live.worker not in {worker, evict}:
        raise Conflict(f"workspace {state.id} is live on {live.worker}", details={"worker": live.worker})
    if state.host not in {None, host}:
        raise Conflict(f"the files of workspace {state.id} are on host {state.host}", details={"host": state.host})
    data = {"worker": worker, "host": host, "ref": ref}
    return Draft(kind="materialized", data=data, message=f"live on {worker}", source="worker")


def stop(state: WorkspaceState, *, worker: str, reason: str) -> Draft | None:
    """The workspace is no longer live on ``worker``. None: it was not."""
    if state.materialization is None or state.materialization.worker != worker:
        return None
    return Draft(kind="stopped", data={"worker": worker, "reason": reason}, message=reason, source="worker")


def lane(state: WorkspaceState | None, *, group: str, alive: set[str]) -> str:
    """The lane for a run on this workspace: its live worker, else the host of its files, else anybody in the group."""
    if state is None or state.host is None:
        return group
    live = state.materialization
    if live and live.worker in alive:
        return f"@{live.worker}"
    return f"~{state.host}"
