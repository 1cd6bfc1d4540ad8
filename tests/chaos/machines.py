"""The machines of the workspaces of an installation, seen from outside: supervisors as processes, or containers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Protocol

from worker.container_spec import INSTALL
from worker.docker_api import DockerApi
from worker.host import host_id


class Machines(Protocol):
    """What the test-bed wants to know of machines, and do to them."""

    async def living(self) -> list[str]:
        """Those that are there, by what names them."""
        ...

    async def kill(self, machine: str) -> None:
        """SIGKILL the supervisor of one."""
        ...

    async def close(self) -> None:
        """Look no more."""
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
        os.kill(int(machine), signal.SIGKILL)

    async def close(self) -> None:
        """Nothing is held."""


def _pid(record: Path) -> str:
    try:
        return str(json.loads(record.read_bytes())["pid"])
    except (OSError, ValueError):
        return ""  # it is being written, or removed


class Containers:
    """Machines of the docker engine."""

    def __init__(self, homes: list[Path]) -> None:
        self._homes = homes
        self._api = DockerApi()

    async def living(self) -> list[str]:
        """The ids of containers, whatever state they are in."""
        found: list[str] = []
        for home in self._homes:
            label = {"label": f"{INSTALL}={host_id(home)}"}
            listed = await self._api.call(lambda client, label=label: client.containers(all=True, filters=label))  # type: ignore[misc]
            found += [str(item["Id"]) for item in listed]
        return sorted(found)

    async def kill(self, machine: str) -> None:
        """``docker kill``."""
        await self._api.call(lambda client: client.kill(machine))

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()


def machines(engine: str, homes: list[Path]) -> Machines:
    """Those of an engine."""
    return Containers(homes) if engine == "docker" else Processes(homes)


async def gone(looking: Machines, patience: float = 10.0) -> list[str]:
    """The machines that are still there after so many seconds."""
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        left = await looking.living()
        if not left or asyncio.get_running_loop().time() > deadline:
            return left
        await asyncio.sleep(0.2)  # nobody tells us
