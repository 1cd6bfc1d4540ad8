"""Ids and names on the command line, completed by the shell from what Helmr knows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from cli.options import Flags

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds a completion may take: a shell that hangs at a tab is worse than none.
_PATIENCE = 1.5
_LIMIT = 50

Names = Callable[["AsyncClient"], Awaitable[list[tuple[str, str]]]]


class Reference(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """The id (or a unique beginning of it, or ``@last``) of a ``name``; ``names`` finds what there is."""

    def __init__(self, name: str, names: Names) -> None:
        self.name = name
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """What begins with ``incomplete``; nothing when Helmr does not answer quickly."""
        try:
            found = asyncio.run(self._ask(ctx.ensure_object(Flags)))
        except Exception:  # noqa: BLE001  # there is nowhere to report it: the shell is in the middle of a line
            return []
        return [CompletionItem(value, help=text) for value, text in found if value.startswith(incomplete)]

    async def _ask(self, flags: Flags) -> list[tuple[str, str]]:
        async with asyncio.timeout(_PATIENCE), flags.client() as client:
            return await self._names(client)


async def _runs(client: AsyncClient) -> list[tuple[str, str]]:
    return [(run.id, f"{run.task_id} {run.status}") for run in await client.runs.list(limit=_LIMIT)]


async def _sessions(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.id, f"{each.task_id} {each.status}") for each in await client.sessions.list(limit=_LIMIT)]


async def _workspaces(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.id, f"{each.sandbox} {each.state}") for each in await client.workspaces.list(limit=_LIMIT)]


async def _execs(client: AsyncClient) -> list[tuple[str, str]]:
    found = await client.workspaces.execs.list(limit=_LIMIT)
    return [(each.id, f"{each.status} {' '.join(each.argv)}"[:60]) for each in found]


async def _deployments(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.version, "current" if each.current else "") for each in await client.deployments.list()]


async def _tasks(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each["id"], each.get("doc", "")) for each in (await client.deployments.get()).index["tasks"]]


async def _sandboxes(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each["name"], each["image"]["base"]) for each in (await client.deployments.get()).index["sandboxes"]]


async def _secrets(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.name, f"version {each.version}") for each in await client.secrets.list()]


async def _queues(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.name, f"{each.in_use} in use, {each.waiting} waiting") for each in await client.queues.list()]


async def _ptys(client: AsyncClient) -> list[tuple[str, str]]:
    found = await client.workspaces.execs.list(limit=_LIMIT)
    return [(each.id, f"{each.status} {' '.join(each.argv)}"[:60]) for each in found if each.terminal]


async def _tokens(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.id, each.status) for each in await client.tokens.list(limit=_LIMIT)]


async def _access(client: AsyncClient) -> list[tuple[str, str]]:
    return [(each.id, f"{each.action} {each.status}") for each in await client.access.list(limit=_LIMIT)]


RUN = Reference("run", _runs)
SESSION = Reference("session", _sessions)
TOKEN = Reference("token", _tokens)
ACCESS = Reference("access", _access)
WORKSPACE = Reference("workspace", _workspaces)
EXEC = Reference("exec", _execs)
PTY = Reference("pty", _ptys)
DEPLOYMENT = Reference("deployment", _deployments)
TASK = Reference("task", _tasks)
SANDBOX = Reference("sandbox", _sandboxes)
QUEUE = Reference("queue", _queues)
SECRET = Reference("secret", _secrets)
