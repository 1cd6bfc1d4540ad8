"""The engine without isolation: a supervisor as a plain child process, a workspace as a plain folder.

It exists so that Helmr can be tried without a container engine, and so that most tests are quick. Tasks run as the worker's
own user, with its files and its network; nothing limits what they use. :meth:`ProcessEngine.check` says so.

A supervisor outlives a killed worker for :data:`worker.process_boot.ORPHAN_TIMEOUT` seconds; the next worker of this home takes
it over, or ends it before it uses the workspace.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import msgspec

from helmr.errors import EngineUnavailable, HelmrError, UsageError
from worker import machine_record, supervisor_record
from worker.engine import (
    BuildSecrets,
    EngineInfo,
    ImageSpec,
    Inheritance,
    MachineSpec,
    Progress,
    superseded,
)
from worker.host import host_id
from worker.left_supervisor import LeftSupervisor
from worker.machine_folder import MachineFolder
from worker.process_boot import ProcessBoot
from worker.process_machine import ProcessMachine
from worker.supervised_machine import reach

log = logging.getLogger(__name__)

#: What may be the name of a folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ProcessEngine:
    """Machines as plain processes (:class:`worker.engine.Engine`).

    Workspaces are the folders ``<home>/workspaces/<id>``. ``runner`` names the function (``module:function``) that tasks are
    handed to, and ``environment`` adds to what every process gets; the defaults are right except in tests.
    """

    name = "process"

    def __init__(
        self, home: Path, *, runner: str = "helmr.guest.runner:main", environment: dict[str, str] | None = None
    ) -> None:
        self._home = home.absolute()
        self._boot = ProcessBoot(runner, environment or {})
        self._machines: dict[str, ProcessMachine] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def owner(self) -> None:
        """Tasks run as the worker's own user."""
        return

    def files(self, workspace_id: str) -> Path:
        """The folder that tasks work in."""
        return self._workspace(workspace_id)

    async def check(self) -> EngineInfo:
        """What this engine is, loud about what it is not.

        Raises:
            EngineUnavailable: the platform has no unix sockets to pass descriptors over, or the home cannot be written.
        """
        if sys.platform not in {"linux", "darwin"}:
            raise EngineUnavailable(
                f"the process engine does not work on {sys.platform}", hint="use a Linux machine, or --engine docker"
            )
        try:
            # Not the docker engine's: a workspace that was walled in must not go on without walls.
            host = f"{host_id(self._home)}-process"
        except OSError as error:
            raise EngineUnavailable(
                f"the home folder {self._home} cannot be written: {error.strerror}",
                hint="set HELMR_HOME to one that can",
            ) from error
        notes = ["no isolation: tasks run as this user, with its files and its network, and without limits"]
        if sys.platform != "linux":
            notes.append("process trees are not tracked on this platform: a task can leave processes behind")
        return EngineInfo(
            name=self.name, version=platform.python_version(), host=host, isolated=False, notes=tuple(notes)
        )

    def retire(self, owner: str, source: str) -> None:
        """Nothing: no machines are started ahead."""

    def guard(self, servers: tuple[tuple[str, int], ...]) -> None:
        """Nothing: this engine has no walls, and says so."""

    async def ensure_image(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:  # noqa: ARG002
        """Always the same: tasks get the worker's own Python, whatever the image says."""
        if spec.steps:
            kinds = ", ".join(dict.fromkeys(step[0] for step in spec.steps))
            progress(f"the process engine ignores the image's steps ({kinds}); tasks run on {sys.executable}")
        return "process"

    async def materialize(self, spec: MachineSpec) -> ProcessMachine:
        """A live supervisor on the workspace's folder, which no other supervisor of this home has.

        Raises:
            UsageError: the workspace's id cannot be the name of a folder, or its network is to be limited.
            EngineUnavailable: the supervisor does not start.
            Unavailable: another supervisor has the folder, under a later claim, or takes it just now.
        """
        if spec.network != "internet":
            raise UsageError(
                "the process engine cannot limit what a task reaches, and this sandbox has a network policy",
                hint='run the worker with --engine docker, or give the sandbox network="internet"',
            )
        workspace = self._workspace(spec.workspace_id)
        async with self._locks[spec.workspace_id]:
            await self._clear(spec.workspace_id, claim=spec.claim)
            workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = self._folder(spec)
            try:
                machine = await self._boot.boot(spec, workspace, folder)
            except BaseException:
                await asyncio.shield(self._remove_leftover(folder))
                raise
            self._machines[spec.workspace_id] = machine
            return machine

    async def delete(self, workspace_id: str) -> None:
        """Remove the workspace's machine, if there is one, and its files."""
        workspace = self._workspace(workspace_id)
        async with self._locks[workspace_id]:
            await self._clear(workspace_id)
            if workspace.exists():
                await asyncio.to_thread(_delete_tree, workspace)

    async def inherit(self, worker_id: str, living: set[str]) -> list[Inheritance]:
        """Take over the supervisors of dead workers that are still alive; see :meth:`worker.engine.Engine.inherit`."""
        taken = await asyncio.gather(*(self._inherit(folder, worker_id, living) for folder in self._folders("*")))
        return [each for each in taken if each is not None]

    async def _inherit(self, folder: MachineFolder, worker_id: str, living: set[str]) -> Inheritance | None:
        process = supervisor_record.read(folder.run)
        if process is None or not process.alive:
            return None
        record = machine_record.seize(folder.path, worker_id, living)
        if record is None:
            return None
        try:
            supervisor = LeftSupervisor(process.pid)
            channel = await reach(folder, worker_id)
        except (HelmrError, ProcessLookupError) as error:
            log.info("supervisor %s cannot be taken over: %s", process.pid, error)
            await self._remove_leftover(folder)
            return None
        mine = msgspec.structs.replace(record, worker=worker_id)
        machine = self._machines[record.workspace_id] = ProcessMachine(mine, supervisor, channel, folder)
        return Inheritance(machine, record.worker, channel.attached)

    async def collect(self, live_workers: set[str], *, spare_running: bool = False) -> list[str]:
        """End the supervisors of workers that are gone."""
        removed = []
        for folder in self._folders("*"):
            workspace_id, worker_id = _owner(folder)
            ours = self._machines.get(workspace_id)
            if worker_id in live_workers or (ours is not None and ours.folder.path == folder.path):
                continue
            if spare_running and _is_alive(folder):
                continue
            async with self._locks[workspace_id]:
                removed += await self._remove_dead(folder, live_workers)
        return removed

    async def _remove_dead(self, folder: MachineFolder, live_workers: set[str]) -> list[str]:
        """Remove what a dead worker has left, unless somebody has just taken it over."""
        with machine_record.held(folder.path) as alone:
            return await self._remove_leftover(folder) if alone and _owner(folder)[1] not in live_workers else []

    async def close(self) -> None:
        """Stop every machine that this engine started."""
        async with asyncio.TaskGroup() as group:
            for workspace_id in list(self._machines):
                group.create_task(self._stop(workspace_id))

    async def _stop(self, workspace_id: str) -> None:
        async with self._locks[workspace_id]:
            machine = self._machines.pop(workspace_id, None)
            if machine is not None:
                await machine.stop()

    def _workspace(self, workspace_id: str) -> Path:
        if not _NAME.fullmatch(workspace_id):
            raise UsageError(f"{workspace_id!r} cannot be the id of a workspace")
        return self._home / "workspaces" / workspace_id

    def _folder(self, spec: MachineSpec) -> MachineFolder:
        """Apart from those of the docker engine, which would take them for leftovers of its own.

        Each claim has its own, so that who wakes up late can tell what its successor is just setting up, and leaves it alone.
        """
        return MachineFolder(self._home / "processes", f"{spec.workspace_id}.{spec.worker_id}.{spec.claim}")

    def _folders(self, workspace_id: str) -> list[MachineFolder]:
        """Those of all workers."""
        found = sorted((self._home / "processes" / "machines").glob(f"{workspace_id}.*"))
        return [MachineFolder(self._home / "processes", path.name) for path in found]

    async def _clear(self, workspace_id: str, *, claim: float = math.inf) -> None:
        """End whatever works in the workspace under a claim up to this one, be it ours or left by an earlier worker."""
        machine = self._machines.pop(workspace_id, None)
        if machine is not None:
            await machine.stop(0)
        found = self._folders(workspace_id)
        if any(_claim(folder) > claim for folder in found):
            raise superseded(workspace_id)
        for folder in found:
            await self._remove_leftover(folder)

    async def _remove_leftover(self, folder: MachineFolder) -> list[str]:
        """End the supervisor that a machine folder belongs to, then remove the folder; returns its pid, if it lived."""
        if not folder.path.exists():
            return []
        record = supervisor_record.read(folder.run)
        ended = record is not None and await asyncio.to_thread(record.end)
        await asyncio.to_thread(folder.remove)
        return [str(record.pid)] if record is not None and ended else []


def _owner(folder: MachineFolder) -> tuple[str, str]:
    """The workspace and the worker of a machine folder; it is named after those that it was made for."""
    record = machine_record.read(folder.path)
    workspace_id, worker_id = folder.path.name.split(".")[:2]
    return workspace_id, worker_id if record is None else record.worker


def _claim(folder: MachineFolder) -> int:
    """The claim that a machine is under, or was made under; the folders of earlier versions of Helmr do not say."""
    record = machine_record.read(folder.path)
    words = folder.path.name.split(".")
    return record.claim if record is not None else int(words[2]) if len(words) > 2 else 0


def _is_alive(folder: MachineFolder) -> bool:
    """Whether the supervisor of a machine folder is still there."""
    process = supervisor_record.read(folder.run)
    return process is not None and process.alive


def _delete_tree(folder: Path) -> None:
    """Delete a folder, whatever permissions tasks gave to what is in it."""
    folder.chmod(0o700)
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)
