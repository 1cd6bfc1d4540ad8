"""Execs: programs run in a workspace beside its runs; run one, steer one, or have one run by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import nats.errors

from helmr import ids, subjects
from helmr.client.exec_handle import CREATE_TIMEOUT, ExecHandle, OutputPage
from helmr.client.wire import PATIENCE
from helmr.durations import Duration, seconds
from helmr.errors import Conflict, HelmrError, NotFound, TimedOut, Unavailable, UsageError
from helmr.exec_frames import Resize, encode
from helmr.models import Exec, ExecChunk, Workspace

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds between looks at an exec of which nothing was heard: its worker may be gone.
_LOOK_AGAIN = 5.0
#: See :mod:`bus.services.execs`.
_MAX_LISTED = 1000
_MAX_TERMINAL = 1000

ExecList = list[Exec]


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """How an exec ended, and all that it wrote."""

    exec: Exec
    stdout: bytes
    stderr: bytes

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 and the number of the signal, if one ended it."""
        return exit_code_of(self.exec)


class Execs:
    """``client.workspaces.execs``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def open(
        self,
        workspace: str | Workspace,
        argv: Sequence[str] = (),
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: bool = True,  # noqa: A002
        terminal: tuple[int, int] | None = None,
        idempotency_key: str | None = None,
        transfer: dict[str, Any] | None = None,
    ) -> ExecHandle:
        """A handle that starts ``argv`` in a workspace when it is entered: ``async with await execs.open(…) as process``.

        The workspace comes to life if it is not. ``cwd`` is a path from the workspace's folder on, and that folder by
        default; ``terminal`` (rows, columns) gives it one, in the place of stdin, stdout and stderr; with ``idempotency_key``
        the same call finds what it started before. (``transfer`` copies files, and is for :meth:`Workspaces.upload`.)

        Raises:
            NotFound: no such workspace.
            Conflict: it is deleted; or the key belongs to another exec.
            Unavailable: no worker can have it.
        """
        body = await self._creation(
            workspace,
            argv,
            cwd=cwd,
            env=env,
            input=input,
            terminal=terminal,
            idempotency_key=idempotency_key,
            transfer=transfer,
        )
        return ExecHandle(self._client.wire, body["id"], body)

    async def start(
        self,
        workspace: str | Workspace,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        terminal: tuple[int, int] | None = None,
        idempotency_key: str | None = None,
    ) -> Exec:
        """Start ``argv`` and leave it alone: it goes on without this client, with an empty input, or with a terminal.

        See :meth:`open`.
        """
        body = await self._creation(
            workspace, argv, cwd=cwd, env=env, input=False, terminal=terminal, idempotency_key=idempotency_key
        )
        return await self._client.wire.call("exec", "create", body, Exec, timeout=CREATE_TIMEOUT)

    async def _creation(
        self,
        workspace: str | Workspace,
        argv: Sequence[str],
        *,
        cwd: str | None,
        env: Mapping[str, str] | None,
        input: bool,  # noqa: A002
        idempotency_key: str | None,
        terminal: tuple[int, int] | None = None,
        transfer: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The request that makes an exec."""
        given = workspace if isinstance(workspace, str) else workspace.id
        workspace_id = await self._client.resolve("workspace", given)
        prefix = "exec" if terminal is None else "pty"
        exec_id = ids.new(prefix)
        if idempotency_key is not None:
            exec_id = ids.derive(prefix, *self._client.scope, workspace_id, idempotency_key)
        rows, columns = terminal or (None, None)
        return {
            "id": exec_id,
            "workspace": workspace_id,
            "argv": list(argv),
            "cwd": cwd,
            "env": dict(env or {}),
            "input": input and terminal is None,
            "rows": rows,
            "columns": columns,
            "transfer": transfer,
            "kept": transfer is None,
        }

    async def attach(self, exec: str | Exec) -> ExecHandle:  # noqa: A002
        """A handle for an exec that is there already: ``async with await execs.attach(…) as process``.

        It begins with what is kept of the output. Whoever steered the exec until then no longer does.
        """
        return ExecHandle(self._client.wire, await self.resolve(exec), None)

    async def resolve(self, exec: str | Exec) -> str:  # noqa: A002
        """The id of an exec, given by id, unique beginning of one, or ``@last``.

        Raises:
            NotFound: nothing begins like this.
            Conflict: several do.
        """
        if not isinstance(exec, str):
            return exec.id
        if _is_id(exec):
            return exec
        found = [each.id for each in await self.list(limit=1 if exec == "@last" else _MAX_LISTED)]
        fit = found if exec == "@last" else [each for each in found if each.startswith(exec)]
        if not fit:
            raise NotFound(f"no exec {exec}", hint="list them with `helmr workspace exec list`")
        if len(fit) > 1:
            raise Conflict(f"{exec} is the beginning of several ids", hint="write more of it: " + ", ".join(fit[:5]))
        return fit[0]

    async def get(self, exec: str | Exec) -> Exec:  # noqa: A002
        """One exec."""
        return await self._client.wire.call("exec", "get", {"id": await self.resolve(exec)}, Exec)

    async def list(self, *, workspace: str | Workspace | None = None, limit: int = 50) -> ExecList:
        """Execs, newest first, of one workspace or of all."""
        body: dict[str, Any] = {"limit": limit}
        if workspace is not None:
            given = workspace if isinstance(workspace, str) else workspace.id
            body["workspace"] = await self._client.resolve("workspace", given)
        return await self._client.wire.call("exec", "list", body, ExecList)

    async def kill(self, exec: str | Exec, *, signal: int | None = None, grace: Duration = 2.0) -> Exec:  # noqa: A002
        """Send a signal to the main process of an exec; without one, end all of it: SIGTERM, and SIGKILL after ``grace``.

        Raises:
            Conflict: it has ended, and was to be signalled.
        """
        body = {"id": await self.resolve(exec), "signal": signal, "grace": seconds(grace, what="grace")}
        return await self._client.wire.call("exec", "kill", body, Exec)

    async def resize(self, exec: str | Exec, rows: int, columns: int) -> Exec:  # noqa: A002
        """Give the terminal of an exec another size; whoever steers it goes on.

        Raises:
            Conflict: it has ended, or has no terminal.
            UsageError: no terminal has that size.
        """
        if not (0 < rows <= _MAX_TERMINAL and 0 < columns <= _MAX_TERMINAL):
            raise UsageError(
                f"a terminal has no {rows} rows and {columns} columns", hint=f"1 to {_MAX_TERMINAL} of each"
            )
        found = await self.get(exec)
        if found.ended or not found.terminal:
            raise Conflict(f"{found.id} {'has ended' if found.ended else 'has no terminal'}")
        wire = self._client.wire
        try:
            await wire.nc.publish(subjects.exec_input(wire.scope, found.id), encode(Resize(rows, columns)))
            await wire.nc.flush()
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the connection to NATS was lost: {error}") from error
        return found

    async def wait(self, exec: str | Exec, *, timeout: Duration | None = None) -> Exec:  # noqa: A002, ASYNC109
        """The exec once it has ended, however it ended.

        Raises:
            TimedOut: that takes longer than ``timeout``; the exec goes on.
        """
        wire, exec_id = self._client.wire, await self.resolve(exec)
        news = asyncio.Event()
        try:
            async with (
                asyncio.timeout(None if timeout is None else seconds(timeout)),
                wire.subscribe(subjects.live(wire.scope, "exec", exec_id), lambda _: news.set()),
            ):
                while not (found := await wire.call("exec", "get", {"id": exec_id}, Exec, patience=PATIENCE)).ended:
                    await _either(news)
        except TimeoutError as error:
            raise TimedOut(f"exec {exec_id} has not ended in {timeout}", hint="it goes on") from error
        return found

    async def output(
        self,
        exec: str | Exec,  # noqa: A002
        *,
        stream: str | None = None,
        offset: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[ExecChunk]:
        """What an exec wrote, as far as it is kept (the latest 64 MiB, for 7 days); ``follow``: until it ends.

        Raises:
            NotFound: what begins at ``offset`` (in bytes, of ``stream``) is not kept any more; says what is.
        """
        wire, exec_id = self._client.wire, await self.resolve(exec)
        news = asyncio.Event()
        request: dict[str, Any] = {"id": exec_id, "stream": stream, "offset": offset}
        async with (
            wire.subscribe(subjects.exec_output(wire.scope, exec_id), lambda _: news.set()),
            wire.subscribe(subjects.live(wire.scope, "exec", exec_id), lambda _: news.set()),
        ):
            ended = not follow
            while True:
                page = await wire.call("exec", "output", request, OutputPage, patience=PATIENCE if follow else 0.0)
                for chunk in page.chunks:
                    request["after"] = chunk.seq
                    yield chunk
                if page.more:
                    continue
                if ended:
                    return
                ended = (await wire.call("exec", "get", {"id": exec_id}, Exec, patience=PATIENCE)).ended
                if not ended:
                    await _either(news)


async def feed(process: ExecHandle, data: bytes) -> None:
    """Write all of its input; a process that ends before it has read it is not at fault."""
    try:
        await process.write(data)
        await process.end_input()
    except Conflict:
        return


async def _either(news: asyncio.Event) -> None:
    """Wait for news, but not for ever: they may have been missed."""
    try:
        async with asyncio.timeout(_LOOK_AGAIN):
            await news.wait()
    except TimeoutError:
        return
    news.clear()


def exit_code_of(exec: Exec) -> int:  # noqa: A002
    """The exit code of an exec that has ended by itself, or was ended.

    Raises:
        HelmrError: it never began, or was lost.
    """
    if exec.exit_code is not None:
        return exec.exit_code
    if exec.status == "lost":
        raise HelmrError(
            f"exec {exec.id} was lost: {exec.reason}",
            hint=f"nothing of it goes on; its output up to then: `helmr workspace exec logs {exec.id}`",
        )
    raise HelmrError(f"exec {exec.id} could not be started: {exec.reason}")


def _is_id(text: str) -> bool:
    return any(ids.is_id(text, prefix) for prefix in ("exec", "pty"))
