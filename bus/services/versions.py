"""Versions of workspaces: listing them, looking into them, going back to one, and making a new workspace of one.

Files are read from versions, so that no container is started, and none is disturbed.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import zstandard

from bus.garbage import Garbage
from bus.log import WORKSPACE, Log, Position
from bus.manifest import CHUNK, ZEROS, Entry, Manifest, shown
from bus.restore import chunk_of
from bus.services.endpoint import Endpoint
from bus.services.workspaces import WorkspaceRef, Workspaces
from bus.stored import Superseded
from bus.versions import Versions
from helmr import ids
from helmr.errors import Conflict, NotFound, UsageError
from helmr.events import WorkspaceEvent
from helmr.models import Collected, FileEntry, Workspace, WorkspaceVersion, workspace_record
from helmr.reducers import workspace as rules
from helmr.subjects import Scope

T = TypeVar("T")

#: Bytes of a file in one reply: base64 makes them a third larger, and servers take 1 MiB by default.
MAX_READ = 512 * 1024
#: Entries in one reply.
MAX_LISTED = 2000
#: Events of one workspace that are looked through for its versions.
_MAX_EVENTS = 100_000
_MANIFESTS, _PACKS = 8, 4
_HOW_MADE = "a run, an exec or a copy makes one when it ends, if files have changed"


class VersionRef(msgspec.Struct, kw_only=True):
    """A version of a workspace, by id, unique beginning of it, or number; none: the latest."""

    id: str
    version: str | None = None


class FilesRequest(VersionRef, kw_only=True):
    """What is in a folder of a version, beyond the path ``after``."""

    path: str = ""
    recursive: bool = False
    after: str | None = None


class ReadRequest(VersionRef, kw_only=True):
    """A part of a file."""

    path: str
    offset: int = 0


class ReadReply(msgspec.Struct, kw_only=True):
    """Bytes from the offset on, and how many the file has."""

    data: bytes
    size: int


class ForkRequest(VersionRef, kw_only=True):
    """A new workspace of a version, with the tags and metadata of its source unless given; a retry repeats ``request_id``."""

    request_id: str
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None


class CollectRequest(msgspec.Struct, kw_only=True):
    """Look for garbage, and remove it or not."""

    remove: bool = False


class WorkspaceVersions:
    """The version service."""

    def __init__(self, log: Log, workspaces: Workspaces, versions: Versions) -> None:
        self.log = log
        self.garbage = Garbage(log.nc, versions)
        self.workspaces = workspaces
        self.versions = versions
        self._manifests: _Recent[Manifest] = _Recent(_MANIFESTS)
        self._packs: _Recent[bytes] = _Recent(_PACKS)

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("workspace", "versions", WorkspaceRef, self.all),
            Endpoint("workspace", "files", FilesRequest, self.files),
            Endpoint("workspace", "stat", ReadRequest, self.stat),
            Endpoint("workspace", "read", ReadRequest, self.read),
            Endpoint("workspace", "restore", VersionRef, self.restore),
            Endpoint("workspace", "fork", ForkRequest, self.fork),
            Endpoint("workspace", "collect", CollectRequest, self.collect),
        ]

    async def all(self, scope: Scope, request: WorkspaceRef) -> list[WorkspaceVersion]:
        """The versions of a workspace, newest first."""
        return [_record(event) for event in reversed(await self._captures(scope, request.id))]

    async def files(self, scope: Scope, request: FilesRequest) -> list[FileEntry]:
        """What is in a folder; at most :data:`MAX_LISTED` entries at a time, in the order of their paths.

        Raises:
            NotFound: no such version, or folder.
        """
        manifest, folder = await self._at(scope, request)
        if folder is not None and folder.kind != "folder":
            return [_file(folder)]
        found = manifest.below(folder.path if folder else b"", deep=request.recursive)
        begin = 0
        if request.after is not None:
            paths = [shown(entry.path) for entry in found]
            begin = paths.index(request.after) + 1 if request.after in paths else len(paths)
        return [_file(entry) for entry in found[begin : begin + MAX_LISTED]]

    async def stat(self, scope: Scope, request: ReadRequest) -> FileEntry:
        """What is at a path."""
        _, entry = await self._at(scope, request)
        if entry is None:
            raise UsageError("say which file or folder")
        return _file(entry)

    async def read(self, scope: Scope, request: ReadRequest) -> ReadReply:
        """A part of a file, from an offset on.

        Raises:
            NotFound: no such version, or file.
            UsageError: it is no file.
        """
        manifest, entry = await self._at(scope, request)
        if entry is None or entry.kind != "file":
            what = "a folder" if entry is None else f"a {entry.kind}"
            raise UsageError(f"{request.path or 'the workspace'} is {what}, and no file")
        if not 0 <= request.offset < entry.size:
            return ReadReply(data=b"", size=entry.size)
        number, begin = divmod(request.offset, CHUNK)
        length = min(CHUNK, entry.size - number * CHUNK)
        chunk = await self._chunk(manifest, entry.chunks[number], length)
        return ReadReply(data=chunk[begin : begin + MAX_READ], size=entry.size)

    async def restore(self, scope: Scope, request: VersionRef) -> Workspace:
        """Have the workspace go on from one of its versions; it is stopped, and what it was is a version by then.

        Raises:
            Conflict: a run or an exec is in it, or it has files that are in no version.
            NotFound: no such version.
        """
        if request.version is None:
            raise UsageError("say which version to restore", hint=f"see `helmr workspace versions {request.id}`")
        event = await self._captured(scope, request)
        await self.workspaces.stop(scope, WorkspaceRef(id=request.id))
        version, manifest = event.data["version"], event.data["manifest"]
        position = await self.log.transact(
            WORKSPACE, scope, request.id, lambda state: rules.restore(state, version=version, manifest=manifest)
        )
        return workspace_record(*scope, position.state)

    async def fork(self, scope: Scope, request: ForkRequest) -> Workspace:
        """A new workspace that begins as a version of this one.

        Raises:
            NotFound: no such version, or none at all yet.
            TooLarge: too many tags, or too much metadata.
        """
        event = await self._captured(scope, request)
        source = (await self.log.present(WORKSPACE, scope, request.id)).state
        draft = rules.fork(event, source, tags=request.tags, metadata=request.metadata)
        at_ms = ids.time_ms(request.request_id)
        fork_id = ids.derive("ws", *scope, "fork", request.request_id, at_ms=at_ms)
        with contextlib.suppress(Superseded):  # a retry: it stands already
            await self.log.append(WORKSPACE, scope, fork_id, Position(0, None), draft)
        return await self.workspaces.get(scope, WorkspaceRef(id=fork_id))

    async def collect(self, _scope: Scope, request: CollectRequest) -> Collected:
        """What the store of versions, which all projects share, holds and no version needs; removed if asked for."""
        found = await self.garbage.find()
        if request.remove:
            await self.garbage.remove(found)
        return Collected(blobs=len(found.garbage), bytes=found.size, kept=found.kept, removed=request.remove)

    async def _captures(self, scope: Scope, workspace_id: str) -> list[WorkspaceEvent]:
        await self.log.present(WORKSPACE, scope, workspace_id)
        events = await self.log.events(WORKSPACE, scope, workspace_id, limit=_MAX_EVENTS)
        return [event for event in events if "version" in event.data]

    async def _captured(self, scope: Scope, request: VersionRef) -> WorkspaceEvent:
        """The event that made a version."""
        events = await self._captures(scope, request.id)
        state = (await self.log.present(WORKSPACE, scope, request.id)).state
        if state.status == "deleted":
            raise Conflict(f"workspace {state.id} is deleted")
        wanted = request.version or state.version
        if wanted is None:
            raise NotFound(f"workspace {request.id} has no version yet", hint=_HOW_MADE)
        found = [event for event in events if _matches(event, wanted)]
        if len(found) > 1:
            raise Conflict(f"{wanted} is the beginning of several versions", hint="write more of it")
        if not found:
            raise NotFound(
                f"workspace {request.id} has no version {wanted}", hint=f"see `helmr workspace versions {request.id}`"
            )
        return found[0]

    async def _at(self, scope: Scope, request: FilesRequest | ReadRequest) -> tuple[Manifest, Entry | None]:
        """A version, and what is at the path in it; None stands for the workspace itself.

        Raises:
            NotFound: no such version, or nothing is there.
        """
        captured = await self._captured(scope, request)
        manifest = await self._manifests.get(captured.data["manifest"], self.versions.manifest)
        return manifest, _find(manifest, request.path, mounted_at=captured.state.mount_path)

    async def _chunk(self, manifest: Manifest, digest: bytes, length: int) -> bytes:
        if digest == ZEROS:
            return bytes(length)
        place = manifest.places[digest]
        pack = await self._packs.get(manifest.packs[place.pack], self.versions.store.get_bytes)
        return chunk_of(pack, place, digest, zstandard.ZstdDecompressor())


class _Recent(OrderedDict[str, T]):
    """The few things used last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    async def get(self, key: str, make: Callable[[str], Awaitable[T]]) -> T:  # type: ignore[override]
        """The thing called ``key``, made now if need be."""
        if key not in self:
            self[key] = await make(key)
        self.move_to_end(key)
        while len(self) > self._size:
            self.popitem(last=False)
        return self[key]


def _matches(event: WorkspaceEvent, wanted: str) -> bool:
    version: str = event.data["version"]
    return str(event.state.versions) == wanted or (wanted.startswith("ver_") and version.startswith(wanted))


def _find(manifest: Manifest, path: str, *, mounted_at: str) -> Entry | None:
    """What is at a path, be it from the workspace's folder on or, as the programs in it see it, from the place of that on.

    Raises:
        NotFound: nothing is there.
    """
    wanted = posixpath.normpath(path)
    if f"{wanted}/".startswith(f"{mounted_at}/"):
        wanted = wanted[len(mounted_at) :]
    wanted = wanted.strip("/")
    if wanted in {"", "."}:
        return None
    for entry in manifest.entries:
        if shown(entry.path) == wanted:
            return entry
    raise NotFound(
        f"there is no {path} in this version", hint="see `helmr workspace files ls`; later changes are in none"
    )


def _record(event: WorkspaceEvent) -> WorkspaceVersion:
    data = event.data
    return WorkspaceVersion(
        id=data["version"],
        number=event.state.versions,
        workspace_id=event.workspace_id,
        parent=data.get("parent"),
        run_id=data.get("run_id"),
        reason=data.get("reason", ""),
        files=data.get("files", 0),
        bytes=data.get("bytes", 0),
        stored=data.get("stored", 0),
        created_at=event.at,
    )


def _file(entry: Entry) -> FileEntry:
    modified = datetime.fromtimestamp(entry.mtime_ns / 1e9, UTC) if entry.kind == "file" else None
    return FileEntry(
        path=shown(entry.path),
        kind=entry.kind,
        mode=entry.mode,
        size=entry.size,
        modified_at=modified,
        target=shown(entry.target) if entry.kind == "link" else None,
    )
