"""Execs for the blocking client; see :mod:`helmr.client.execs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

from helmr.client.exec_handle import ExecHandle as AioHandle
from helmr.client.execs import ExecList
from helmr.durations import Duration
from helmr.models import Exec, ExecChunk, Workspace

if TYPE_CHECKING:
    from helmr.client.sync import Client


class ExecHandle(AbstractContextManager["ExecHandle"]):
    """An exec that this client steers: use as ``with``; see :class:`helmr.client.exec_handle.ExecHandle`."""

    def __init__(self, client: Client, aio: AioHandle) -> None:
        self._client = client
        self.aio = aio
        self.id = aio.id

    def __enter__(self) -> Self:
        self._client.call(self.aio.__aenter__)
        return self

    def __exit__(self, *details: object) -> None:
        self._client.call(self.aio.__aexit__, *details)

    def __iter__(self) -> Iterator[ExecChunk]:
        """What it writes, until it has ended."""
        return self._client.iterate(aiter(self.aio))

    @property
    def record(self) -> Exec:
        """The exec as last known."""
        return self.aio.record

    def detach(self) -> None:
        """Have it go on when the block is left."""
        self.aio.detached = True

    def write(self, data: bytes) -> None:
        """Write to its input; blocks while the process has too much that it has not read."""
        self._client.call(self.aio.write, data)

    def end_input(self) -> None:
        """Have its input end."""
        self._client.call(self.aio.end_input)

    def signal(self, number: int) -> None:
        """Signal its main process and the group of that."""
        self._client.call(self.aio.signal, number)

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        self._client.call(self.aio.resize, rows, columns)

    def wait(self) -> Exec:
        """The exec once it has ended; read what it writes first."""
        return self._client.call(self.aio.wait)


class Execs:
    """``client.workspaces.execs``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def open(self, workspace: str | Workspace, argv: Any = (), **options: Any) -> ExecHandle:
        """A handle that starts ``argv`` when it is entered; see :meth:`helmr.client.execs.Execs.open` for the options."""
        opened = self._client.call(self._client.aio.workspaces.execs.open, workspace, argv, **options)
        return ExecHandle(self._client, opened)

    def attach(self, exec: str | Exec) -> ExecHandle:  # noqa: A002
        """A handle for an exec that is there already."""
        return ExecHandle(self._client, self._client.call(self._client.aio.workspaces.execs.attach, exec))

    def start(self, workspace: str | Workspace, argv: Any, **options: Any) -> Exec:
        """Start ``argv`` and leave it alone; see :meth:`helmr.client.execs.Execs.start` for the options."""
        return self._client.call(self._client.aio.workspaces.execs.start, workspace, argv, **options)

    def get(self, exec: str | Exec) -> Exec:  # noqa: A002
        """One exec."""
        return self._client.call(self._client.aio.workspaces.execs.get, exec)

    def list(self, *, workspace: str | Workspace | None = None, limit: int = 50) -> ExecList:
        """Execs, newest first, of one workspace or of all."""
        return self._client.call(self._client.aio.workspaces.execs.list, workspace=workspace, limit=limit)

    def kill(self, exec: str | Exec, *, signal: int | None = None, grace: Duration = 2.0) -> Exec:  # noqa: A002
        """Send a signal to the main process of an exec; without one, end all of it."""
        return self._client.call(self._client.aio.workspaces.execs.kill, exec, signal=signal, grace=grace)

    def resize(self, exec: str | Exec, rows: int, columns: int) -> Exec:  # noqa: A002
        """Give the terminal of an exec another size; whoever steers it goes on."""
        return self._client.call(self._client.aio.workspaces.execs.resize, exec, rows, columns)

    def wait(self, exec: str | Exec, *, timeout: Duration | None = None) -> Exec:  # noqa: A002
        """The exec once it has ended, however it ended."""
        return self._client.call(self._client.aio.workspaces.execs.wait, exec, timeout=timeout)

    def output(self, exec: str | Exec, **options: Any) -> Iterator[ExecChunk]:  # noqa: A002
        """What an exec wrote; see :meth:`helmr.client.execs.Execs.output` for the options."""
        return self._client.iterate(self._client.aio.workspaces.execs.output(exec, **options))
