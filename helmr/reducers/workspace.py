"""The life of a workspace: created once, live on one worker at a time, and where its files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict, TooLarge
from helmr.events import Draft, Materialization, VersionFacts, WorkspaceEvent, WorkspaceState
from helmr.tags import check_tags


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
    fold = _FOLDS.get(kind)
    if fold is None:
        raise Conflict(f"workspace {state.id}: {kind} cannot follow")
    return msgspec.structs.replace(state, cursor=state.cursor + 1, updated_at=at, **fold(state, data, at))


_Fold = Callable[[WorkspaceState, dict[str, Any], datetime], dict[str, Any]]


def _materialized(_state: WorkspaceState, data: dict[str, Any], at: datetime) -> dict[str, Any]:
    live = Materialization(worker=data["worker"], ref=data.get("ref", ""), at=at)
    return {"materialization": live, "host": data["host"], "isolated": data.get("isolated")}


def _captured(state: WorkspaceState, data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    latest = {"version": data["version"], "manifest": data["manifest"]}
    return {**latest, "versions": state.versions + 1, "unsaved": False}


def _uncaptured(_state: WorkspaceState, _data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    return {"unsaved": True}


def _stopped(_state: WorkspaceState, _data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    return {"materialization": None}


def _unbound(state: WorkspaceState, _data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    return {"materialization": None, "host": None, "epoch": state.epoch + 1}


def _restored(state: WorkspaceState, data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    return {"version": data["to"], "manifest": data["manifest"], "host": None, "epoch": state.epoch + 1}


def _updated(_state: WorkspaceState, data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    named = ("sandbox", "fingerprint", "deployment_id", "mount_path", "metadata")
    changed = {name: data[name] for name in named if name in data}
    return changed | ({"tags": tuple(data["tags"])} if "tags" in data else {})


def _deleted(_state: WorkspaceState, _data: dict[str, Any], _at: datetime) -> dict[str, Any]:
    return {"status": "deleted", "materialization": None, "host": None}


_FOLDS: dict[str, _Fold] = {
    "materialized": _materialized,
    "captured": _captured,
    "uncaptured": _uncaptured,
    "stopped": _stopped,
    "unbound": _unbound,
    "restored": _restored,
    "updated": _updated,
    "deleted": _deleted,
}


#: Bytes of JSON: less than for runs, because each later event of the workspace repeats them.
MAX_METADATA = 16 * 1024


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be different about a workspace; what is not named stays.

    Entries of ``metadata`` replace those of the same name, and None removes one. ``sandbox`` has the fields of ``created``.
    """

    tag: tuple[str, ...] = ()
    untag: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}
    sandbox: dict[str, str] | None = None


def create(
    *,
    sandbox: str,
    fingerprint: str,
    deployment_id: str,
    mount_path: str,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Draft:
    """A new, empty workspace of a sandbox.

    Raises:
        TooLarge: too many tags, or too much metadata.
    """
    data = {"sandbox": sandbox, "fingerprint": fingerprint, "deployment_id": deployment_id, "mount_path": mount_path}
    said = _said(tags, metadata or {})
    return Draft(kind="created", data=data | said, message=f"created from sandbox {sandbox}")


def materialize(
    state: WorkspaceState, *, worker: str, host: str, ref: str, evict: str | None = None, isolated: bool | None = None
) -> Draft:
    """The workspace is live on ``worker``; ``evict`` names a worker that is known to be gone.

    Raises:
        Conflict: it is live elsewhere (``details["worker"]``), its files are on another host (``details["host"]``), or it
            would lose the walls it has lived between, or get some.
    """
    live = state.materialization
    if live and live.worker not in {worker, evict}:
        raise Conflict(f"workspace {state.id} is live on {live.worker}", details={"worker": live.worker})
    if state.host not in {None, host}:
        raise Conflict(f"the files of workspace {state.id} are on host {state.host}", details={"host": state.host})
    if state.isolated is not None and isolated is not None and state.isolated != isolated:
        raise Conflict(f"workspace {state.id} was made {'with' if state.isolated else 'without'} isolation")
    data = {"worker": worker, "host": host, "ref": ref, "isolated": isolated}
    return Draft(kind="materialized", data=data, message=f"live on {worker}", source="worker")


def inherit(state: WorkspaceState, *, worker: str, former: str, host: str, ref: str) -> Draft:
    """``worker`` takes over the live machine ``ref`` from ``former``, which is known to be gone.

    Raises:
        Conflict: by the log the workspace is not live on ``former``: the machine is not what it is live in.
    """
    live = state.materialization
    if state.status == "deleted" or live is None or live.worker != former or state.host != host:
        raise Conflict(f"workspace {state.id} is not live on {former}")
    data = {"worker": worker, "host": host, "ref": ref, "isolated": state.isolated, "from": former}
    return Draft(kind="materialized", data=data, message=f"taken over by {worker} from {former}", source="worker")


def capture(
    state: WorkspaceState, *, worker: str, version: str, facts: VersionFacts, reason: str, run_id: str | None
) -> Draft:
    """The files of the workspace, live on ``worker``, are stored as a version.

    Raises:
        Conflict: it is not live there (any more).
    """
    if state.materialization is None or state.materialization.worker != worker:
        raise Conflict(f"workspace {state.id} is not live on {worker}")
    data = {"version": version, "parent": state.version, "run_id": run_id, "reason": reason}
    stored = msgspec.to_builtins(facts)
    return Draft(kind="captured", data={**data, **stored}, message=f"version of {facts.files} files", source="worker")


def fail_capture(state: WorkspaceState, *, worker: str, reason: str) -> Draft | None:
    """Files of the workspace could not be stored: they are on its host alone. None: that is known, or it is not live there."""
    if state.unsaved or state.materialization is None or state.materialization.worker != worker:
        return None
    return Draft(kind="uncaptured", data={"reason": reason}, message=reason[:500], source="worker")


def unbind(state: WorkspaceState, *, host: str, alive: set[str]) -> Draft | None:
    """The workspace may go on elsewhere, from its latest version: no worker of ``host`` is there (``alive`` are elsewhere).

    None: it is not there, is live, or has files that are nowhere else.
    """
    live = state.materialization
    if state.status == "deleted" or state.host != host or state.unsaved or (live and live.worker in alive):
        return None
    return Draft(
        kind="unbound", data={"host": host}, message=f"host {host} is gone; it goes on from its latest version"
    )


def restore(state: WorkspaceState, *, version: str, manifest: str) -> Draft:
    """The workspace goes on from one of its versions.

    Raises:
        Conflict: it is live, or has files that are in no version and would be lost.
    """
    if state.materialization is not None:
        raise Conflict(f"workspace {state.id} is live on {state.materialization.worker}", hint="stop it first")
    if state.unsaved:
        raise Conflict(
            f"workspace {state.id} has files on host {state.host} that are in no version",
            hint="see the event `uncaptured` for why; once a run ends without it, try again",
        )
    data = {"to": version, "from": state.version, "manifest": manifest}
    return Draft(kind="restored", data=data, message=f"goes on from version {version}")


def update(state: WorkspaceState, changes: Changes) -> Draft | None:
    """Other tags, metadata, or another sandbox from its next start on. None: all of that is so already.

    Raises:
        Conflict: it would change its sandbox while it is live.
        TooLarge: too many tags, or too much metadata.
    """
    said = _said(({*state.tags} - {*changes.untag}) | {*changes.tag}, {**state.metadata, **changes.metadata})
    data = {name: value for name, value in said.items() if value != getattr(state, name)}
    if changes.sandbox is not None and needs_stop(state, changes.sandbox):
        if state.materialization is not None:
            raise Conflict(f"workspace {state.id} is live on {state.materialization.worker}", hint="stop it first")
        data |= changes.sandbox
    if not data:
        return None
    return Draft(kind="updated", data=data, message=f"changed: {', '.join(sorted(data.keys() & _TOLD))}")


_TOLD = {"tags", "metadata", "sandbox"}


def needs_stop(state: WorkspaceState, sandbox: dict[str, str]) -> bool:
    """Whether having this sandbox would change what the workspace's container is."""
    return any(getattr(state, name) != sandbox[name] for name in ("sandbox", "fingerprint", "mount_path"))


def _said(tags: Iterable[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Tags and metadata as a workspace has them: each tag once, no entry that is None, and within the limits."""
    distinct = tuple(sorted({*tags}))
    check_tags(distinct, of="a workspace", hint="leave some out")
    entries = {key: value for key, value in metadata.items() if value is not None}
    size = len(msgspec.json.encode(entries))
    if size > MAX_METADATA:
        raise TooLarge(
            f"the metadata would be {size} bytes of JSON; a workspace has at most {MAX_METADATA}",
            hint="keep the rest in a file of it",
        )
    return {"tags": distinct, "metadata": entries}


def delete(state: WorkspaceState) -> Draft | None:
    """The workspace and its versions are gone for good. None: they were.

    Raises:
        Conflict: it is live.
    """
    if state.status == "deleted":
        return None
    if state.materialization is not None:
        raise Conflict(f"workspace {state.id} is live on {state.materialization.worker}", hint="stop it first")
    return Draft(kind="deleted", data={"host": state.host}, message="deleted")


def fork(
    captured: WorkspaceEvent,
    source: WorkspaceState,
    *,
    tags: Iterable[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Draft:
    """A new workspace that begins as the version which this event made.

    Of ``source``, as it is now, it takes the tags unless others are given, and likewise the metadata: they say whose it is,
    which was so before and after that version.

    Raises:
        TooLarge: too many tags, or too much metadata.
    """
    state, data = captured.state, captured.data
    said = _said(source.tags if tags is None else tags, source.metadata if metadata is None else metadata)
    body = {
        "sandbox": state.sandbox,
        "fingerprint": state.fingerprint,
        "deployment_id": state.deployment_id,
        "mount_path": state.mount_path,
        "isolated": state.isolated,
        "forked_from": state.id,
        "epoch": 1,
        "versions": 1,
    }
    version = {key: data[key] for key in ("version", "manifest", "files", "bytes") if key in data}
    return Draft(
        kind="created", data=body | version | said, message=f"forked from {state.id}, version {data['version']}"
    )


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
