"""The machines of the workspaces of an installation, seen from outside: supervisors as processes, or containers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from docker import APIClient
from docker.errors import DockerException
from requests.exceptions import RequestException

#: Seconds the engine gets to answer us.
_PATIENCE = 30


class Missed(Exception):
    """What was to be broken was not there."""


class Machines(Protocol):
    """What the test-bed wants to know of machines, and do to them."""

    async def living(self) -> list[str]:
        """Those that are there, by what names them."""
        ...

    async def kill(self, machine: str) -> None:
        """SIGKILL the supervisor of one."""
        ...


class Processes:
    """Machines of the process engine."""

    def __init__(self, homes: list[Path]) -> None:
        self._homes = homes

    async def living(self) -> list[str]:
        """The process ids of supervisors."""
        records = [path for home in self._homes for path in home.glob("processes/machines/*/run/supervisor.json")]
        found = [_pid(path) for path in records]
        return sorted(pid for pid in found if pid and Path(f"/proc/{pid}").exists())

    async def kill(self, machine: str) -> None:
        """SIGKILL one."""
        try:
            os.kill(int(machine), signal.SIGKILL)
        except ProcessLookupError as error:
            raise Missed(machine) from error


def _pid(record: Path) -> str:
    try:
        return str(json.loads(record.read_bytes())["pid"])
    except (OSError, ValueError):
        return ""  # it is being written, or removed


class Containers:
    """Machines of the docker engine, in an engine of the test-bed's own: all that is there is ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def living(self) -> list[str]:
        """The ids of containers, whatever state they are in."""
        return sorted(str(item["Id"]) for item in await self._ask(lambda client: client.containers(all=True)))

    async def volumes(self) -> list[str]:
        """The names of volumes."""
        return [str(item["Name"]) for item in (await self._ask(lambda client: client.volumes()))["Volumes"] or []]

    async def kill(self, machine: str) -> None:
        """``docker kill``."""
        await self._ask(lambda client: client.kill(machine))

    async def kill_init(self, machine: str) -> None:
        """SIGKILL the first process of one, past the engine."""
        pid = (await self._ask(lambda client: client.inspect_container(machine)))["State"]["Pid"]
        if pid:
            os.kill(pid, signal.SIGKILL)

    async def pause(self, machine: str) -> None:
        """``docker pause``."""
        await self._ask(lambda client: client.pause(machine))

    async def unpause(self, machine: str) -> None:
        """``docker unpause``."""
        await self._ask(lambda client: client.unpause(machine))

    async def _ask(self, request: Callable[[APIClient], Any]) -> Any:
        """What the engine answers.

        Raises:
            Missed: it is away, or has no such container, or the container is not fit for that.
        """

        def work() -> Any:
            with contextlib.closing(APIClient(base_url=self._url, version="1.41", timeout=_PATIENCE)) as client:
                return request(client)

        try:
            return await asyncio.to_thread(work)
        except (DockerException, RequestException) as error:
            raise Missed(str(error)) from error


async def gone(looking: Machines, patience: float = 10.0) -> list[str]:
    """The machines that are still there after so many seconds."""
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        left = await looking.living()
        if not left or asyncio.get_running_loop().time() > deadline:
            return left
        await asyncio.sleep(0.2)  # nobody tells us
