"""Which task project ``helmr dev`` keeps deployed in a home folder, for the commands beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

_NAME = "dev.json"


class DevState(msgspec.Struct, frozen=True, kw_only=True):
    """The folder, the scope it is deployed in, the process that does it, and files whose changes alone it leaves be."""

    pid: int
    root: str
    project: str
    env: str
    left_out: tuple[str, ...] = ()


def write(home: Path, *, root: Path, project: str, env: str, left_out: tuple[str, ...] = ()) -> None:
    """Say that this process keeps ``root`` deployed."""
    state = DevState(pid=os.getpid(), root=str(root), project=project, env=env, left_out=left_out)
    scratch = home / f".{_NAME}.{state.pid}"
    scratch.write_bytes(msgspec.json.encode(state))
    scratch.replace(home / _NAME)


def remove(home: Path) -> None:
    """Take it back, if it is ours."""
    state = read(home)
    if state is not None and state.pid == os.getpid():
        (home / _NAME).unlink(missing_ok=True)


def read(home: Path) -> DevState | None:
    """What runs here; None when nothing does."""
    try:
        state = msgspec.json.decode((home / _NAME).read_bytes(), type=DevState)
        os.kill(state.pid, 0)
    except PermissionError:
        return None  # somebody else's home: nothing we could be told about
    except (OSError, msgspec.DecodeError):
        return None
    return state


async def is_current(client: AsyncClient, root: Path) -> bool:
    """Whether the current deployment is what the folder holds at this moment."""
    import asyncio

    from helmr.config import load
    from helmr.errors import NotFound
    from helmr.project import pack

    archive = await asyncio.to_thread(pack, root, load(root).ignore)
    try:
        current = await client.deployments.get()
    except NotFound:
        return False
    return current.content_hash == archive.digest
