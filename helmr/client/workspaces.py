"""Workspaces: get, list, stop; their versions, and the files in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from helmr import ids
from helmr.client.execs import ExecResult, Execs, exit_code_of, feed
from helmr.client.pages import newest
from helmr.models import Collected, FileEntry, Workspace, WorkspaceVersion

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds a stop may take: the worker ends what is left of the container's processes first.
_STOP_TIMEOUT = 40.0
_DELETE_TIMEOUT = 80.0
#: Seconds for a look at the whole store of versions.
_COLLECT_TIMEOUT = 600.0
#: Seconds for a look into a version: its manifest may have to be fetched first.
_READ_TIMEOUT = 60.0
#: Entries that come at a time; see :data:`bus.services.versions.MAX_LISTED`.
_PAGE = 2000

#: A program that does nothing, in any image: a container is alive once it could be executed.
_NOTHING = ("/bin/sh", "-c", ":")

T = TypeVar("T")
VersionList = list[WorkspaceVersion]
FileList = list[FileEntry]
#: Names, and why.
LeftOut = list[str]


class _ReadReply(msgspec.Struct):
    data: bytes
    size: int


class Workspaces:
    """``client.workspaces``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.execs = Execs(client)

    async def exec(
        self,
        workspace: str | Workspace,
        argv: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a program in a workspace, beside its runs, to its end; its output is collected, so let it be little.

        The workspace comes to life if it is not; if files have changed, there is a new version of it at the end. Cancelling the
        call ends the program. For more, see :meth:`helmr.client.execs.Execs.open`.

        Raises:
            NotFound: no such workspace.
            HelmrError: the program could not be started, or was lost together with its worker.
        """
        written = {"stdout": bytearray(), "stderr": bytearray()}
        async with await self.execs.open(workspace, argv, cwd=cwd, env=env, input=bool(input)) as process:
            feeding = asyncio.create_task(feed(process, input)) if input else None
            try:
                async for chunk in process:
                    written[chunk.stream] += chunk.data
            finally:
                if feeding is not None:
                    feeding.cancel()
            ended = await process.wait()
        exit_code_of(ended)
        return ExecResult(exec=ended, stdout=bytes(written["stdout"]), stderr=bytes(written["stderr"]))

    async def create(
        self,
        *,
        task: str | None = None,
        sandbox: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Workspace:
        """A new, empty workspace, made from a sandbox of the current deployment: that of a task, or one by name.

        It has up to 10 ``tags`` of 128 characters, and ``metadata`` of up to 16 KiB of JSON.

        Raises:
            NotFound: nothing is deployed, or no such task or sandbox.
            TooLarge: too many tags, or too much metadata.
        """
        body: dict[str, Any] = {"task": task, "sandbox": sandbox, "request_id": ids.new("req")}
        body |= {"tags": [*tags], "metadata": dict(metadata or {})}
        return await self._client.wire.call("workspace", "create", body, Workspace)

    async def upload(
        self, workspace: str | Workspace, source: Path | str, path: str = "", *, ignore: bool = True
    ) -> LeftOut:
        """Copy a local folder, file or link into a workspace; returns what was left out.

        In a folder that is there (default: the workspace's own), or at a ``path`` that ends with ``/``, it keeps its name;
        the content of a folder is ``folder/.``. Modes, times and links are kept; links are not followed. With ``ignore``, what
        ``.gitignore`` files and ``.helmrignore`` name stays here.

        Raises:
            NotFound: there is nothing at ``source``.
            HelmrError: it cannot be read, or not be written, or ``path`` leads out of the workspace.
        """
        from helmr.client import copies

        copies.check_source(Path(source))
        task = {"op": "receive", "path": path, "name": copies.name_of(str(source))}
        async with await self.execs.open(workspace, transfer=task) as process:
            return await copies.upload(process, Path(source), ignore=ignore)

    async def download(self, workspace: str | Workspace, path: str, target: Path | str = ".") -> LeftOut:
        """Copy a folder, file or link out of a workspace, as it is now, to ``target``, or into it, if that is a folder.

        Nothing is written elsewhere, whatever the workspace holds; links that lead out of what is copied are left out. Returns
        what was.

        Raises:
            NotFound: there is no folder for it.
            HelmrError: it cannot be read, or not be written, or ``path`` leads out of the workspace.
        """
        from helmr.client import copies

        place = copies.place_of(Path(target).absolute())
        task = {"op": "send", "path": path}
        async with await self.execs.open(workspace, transfer=task, input=False) as process:
            return await copies.download(process, *place, copies.name_of(path))

    async def materialize(self, workspace: str | Workspace) -> Workspace:
        """Bring a workspace to life without a run; it stays until it has been idle for a while, or is stopped.

        Raises:
            NotFound: no such workspace.
            Conflict: it is deleted.
            Unavailable: no worker can have it.
            HelmrError: its container cannot be started.
        """
        exit_code_of((await self.exec(workspace, _NOTHING)).exec)
        return await self.get(workspace)

    async def get(self, workspace: str | Workspace) -> Workspace:
        """One workspace, by id, unique prefix or ``@last``."""
        return await self._client.wire.call("workspace", "get", {"id": await self._id(workspace)}, Workspace)

    async def list(self, *, tag: str | None = None, limit: int = 50) -> list[Workspace]:
        """Workspaces, newest first; those with a tag only, if one is given."""
        return await newest(self._client.wire, "workspaces", {"tag": tag}, Workspace, limit)

    async def update(
        self,
        workspace: str | Workspace,
        *,
        tag: Sequence[str] = (),
        untag: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        task: str | None = None,
        sandbox: str | None = None,
    ) -> Workspace:
        """Change what is said of a workspace, or what it is made from; what is not named stays as it is.

        ``tag`` and ``untag`` add and remove tags (10 of 128 characters). Entries of ``metadata`` replace those of the same
        name, None removes one (16 KiB of JSON in all). ``sandbox``, or that of a ``task``, is taken from the current
        deployment, for instance after its memory was changed: the container is stopped, and the next one is made from it.

        Raises:
            Conflict: it is deleted; or a run or an exec is in it, and its sandbox would change.
            NotFound: no such task or sandbox.
            TooLarge: too many tags, or too much metadata.
        """
        body: dict[str, Any] = {"id": await self._id(workspace), "tag": [*tag], "untag": [*untag]}
        body |= {"metadata": dict(metadata or {}), "task": task, "sandbox": sandbox}
        return await self._client.wire.call("workspace", "update", body, Workspace, timeout=_STOP_TIMEOUT)

    async def stop(self, workspace: str | Workspace) -> Workspace:
        """End the container of a workspace; its files stay.

        Raises:
            Conflict: a run or an exec is in it.
        """
        body = {"id": await self._id(workspace)}
        return await self._client.wire.call("workspace", "stop", body, Workspace, timeout=_STOP_TIMEOUT)

    async def versions(self, workspace: str | Workspace) -> VersionList:
        """The versions of a workspace, newest first."""
        body = {"id": await self._id(workspace)}
        return await self._client.wire.call("workspace", "versions", body, VersionList, timeout=_READ_TIMEOUT)

    async def files(
        self, workspace: str | Workspace, path: str = "", *, version: str | None = None, recursive: bool = False
    ) -> FileList:
        """What is in a folder of a version (by id, unique beginning, or number; default: the latest).

        Raises:
            NotFound: no such version, or folder.
        """
        body = {"id": await self._id(workspace), "path": path, "version": version, "recursive": recursive}
        found: FileList = []
        while True:
            after = {"after": found[-1].path} if found else {}
            page = await self._call("files", body | after, FileList)
            found += page
            if len(page) < _PAGE:
                return found

    async def stat(self, workspace: str | Workspace, path: str, *, version: str | None = None) -> FileEntry:
        """One file, folder or link of a version."""
        body = {"id": await self._id(workspace), "path": path, "version": version}
        return await self._call("stat", body, FileEntry)

    async def read(self, workspace: str | Workspace, path: str, *, version: str | None = None) -> AsyncIterator[bytes]:
        """The content of a file of a version, piece by piece.

        Raises:
            NotFound: no such version, or file.
            UsageError: it is no file.
        """
        body = {"id": await self._id(workspace), "path": path, "version": version}
        offset, size = 0, 1
        while offset < size:
            reply = await self._call("read", body | {"offset": offset}, _ReadReply)
            offset, size = offset + len(reply.data), reply.size
            if reply.data:
                yield reply.data

    async def restore(self, workspace: str | Workspace, version: str) -> Workspace:
        """Have a workspace go on from one of its versions; its container is stopped.

        Raises:
            Conflict: a run or an exec is in it, or it has files that are in no version.
            NotFound: no such version.
        """
        body = {"id": await self._id(workspace), "version": version}
        return await self._client.wire.call("workspace", "restore", body, Workspace, timeout=_STOP_TIMEOUT)

    async def fork(
        self,
        workspace: str | Workspace,
        *,
        version: str | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Workspace:
        """A new workspace that begins as a version of this one; default: the latest.

        It has the tags of this one, as they are now, or those that are given instead, and likewise the metadata. To begin
        without, give ``()`` and ``{}``.

        Raises:
            NotFound: no such version, or none yet.
            TooLarge: too many tags, or too much metadata.
        """
        body: dict[str, Any] = {"id": await self._id(workspace), "version": version, "request_id": ids.new("req")}
        body |= {"tags": None if tags is None else [*tags], "metadata": None if metadata is None else dict(metadata)}
        return await self._call("fork", body, Workspace)

    async def delete(self, workspace: str | Workspace) -> Workspace:
        """Delete a workspace, its files, and in time its versions; there is no way back.

        Raises:
            Conflict: a run or an exec is in it.
        """
        body = {"id": await self._id(workspace)}
        return await self._client.wire.call("workspace", "delete", body, Workspace, timeout=_DELETE_TIMEOUT)

    async def collect(self, *, remove: bool = False) -> Collected:
        """What the store of versions holds, for all projects, and no version has needed for an hour; removed on request."""
        return await self._client.wire.call(
            "workspace", "collect", {"remove": remove}, Collected, timeout=_COLLECT_TIMEOUT
        )

    async def _call(self, verb: str, body: dict[str, Any], reply: type[T]) -> T:
        return await self._client.wire.call("workspace", verb, body, reply, timeout=_READ_TIMEOUT)

    async def _id(self, workspace: str | Workspace) -> str:
        given = workspace if isinstance(workspace, str) else workspace.id
        return await self._client.resolve("workspace", given)
