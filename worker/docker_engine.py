"""The real engine: one Docker container per live workspace, its files in a folder of the host that outlives every container.

The SDK creates, inspects and removes; everything a task does goes over the supervisor's socket.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from helmr import ids
from helmr.errors import EngineUnavailable, HelmrError
from worker import machine_record
from worker.channel import Channel
from worker.container_boot import ContainerBoot
from worker.container_spec import task_owner
from worker.containers import Container, Containers
from worker.docker_api import DockerApi, connection
from worker.docker_machine import DockerMachine
from worker.egress import Egress
from worker.egress_rules import Neighbourhood, Rules
from worker.engine import (
    BuildSecrets,
    EngineInfo,
    ImageSpec,
    Inheritance,
    MachineSpec,
    Network,
    Progress,
    superseded,
)
from worker.host import host_id
from worker.images import Images
from worker.machine_folder import (
    MachineFolder,
    remove_files,
    sweep,
    workspace_files,
)
from worker.machine_record import MachineRecord
from worker.pool import Pool
from worker.supervised_machine import reach

log = logging.getLogger(__name__)


class DockerEngine:
    """Machines as Docker containers (:class:`worker.engine.Engine`)."""

    name = "docker"

    def __init__(
        self, home: Path, neighbourhood: Neighbourhood | None = None, *, pool: int = 0, api: DockerApi | None = None
    ) -> None:
        self._home = home.absolute()
        self._neighbourhood = neighbourhood or Neighbourhood.of()
        self._api = api or DockerApi()
        #: What our containers are labelled with: the id of this home on this host.
        self.install = host_id(self._home)
        self._images = Images(self._api, self._home, self.install)
        self._containers = Containers(self._api, self._home, self.install)
        self._boot = ContainerBoot(
            self._api, self._home, self.install, images=self._images, containers=self._containers, cpus=self._cpus
        )
        self._machines: dict[str, DockerMachine] = {}
        self._workers: set[str] = set()
        #: Folders of the containers that are being made, or are somebody's: a container without is nobody's.
        self._folders: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._facts: dict[str, Any] = {}
        self._pool: Pool[DockerMachine] = Pool(self._make, pool)

    @property
    def owner(self) -> tuple[int, int]:
        """The user of tasks in every container."""
        return task_owner(), task_owner()

    def files(self, workspace_id: str) -> Path:
        """The folder that is mounted as the workspace."""
        return workspace_files(self._home, workspace_id)

    async def check(self) -> EngineInfo:
        """Whether the engine can be used, and what is special about it.

        Raises:
            EngineUnavailable: no engine, no permission, or one that machines cannot work with.
        """
        facts = self._facts = await self._api.call(lambda client: client.info(), patience=10)
        if facts.get("OSType") != "linux" or facts.get("OperatingSystem") == "Docker Desktop":
            raise EngineUnavailable(
                "this Docker engine runs in a virtual machine, into which unix sockets cannot be shared",
                hint="run the worker on the Linux machine that has the engine, or use --engine process",
            )
        version = str(facts["ServerVersion"])
        return EngineInfo(name=self.name, version=version, host=self.install, isolated=True, notes=tuple(_notes(facts)))

    async def _cpus(self) -> int:
        if not self._facts:
            await self.check()
        return int(self._facts["NCPU"])

    def retire(self, owner: str, source: str) -> None:
        """Let go of containers that were started ahead with other code of ``owner``."""
        self._pool.retire(owner, source)

    def guard(self, servers: tuple[tuple[str, int], ...]) -> None:
        """Close these servers to the machines to come, whatever their operator opens."""
        self._neighbourhood = msgspec.structs.replace(self._neighbourhood, servers=servers)

    async def ensure_image(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:
        """The name of the image for ``spec``, building or pulling it if need be; see :class:`worker.images.Images`."""
        return await self._images.ensure(spec, progress, secrets)

    async def materialize(self, spec: MachineSpec) -> DockerMachine:
        """A live container on the workspace's files, which no other container has.

        Raises:
            ImageError: the image is not there, or its Python cannot run the supervisor.
            EngineUnavailable, HelmrError: the engine is gone, or refuses.
            Unavailable: another container has them, under a later claim.
        """
        async with self._locks[spec.workspace_id]:
            machine = await self._adopt(spec)
            if machine is None:
                await self._clear(spec.workspace_id, claim=spec.claim)
                machine = await self._make(spec)
            self._machines[spec.workspace_id] = machine
            return machine

    async def _adopt(self, spec: MachineSpec) -> DockerMachine | None:
        """A machine that was started ahead, for a workspace that has no files here and so no container either."""
        files = workspace_files(self._home, spec.workspace_id)
        if files.exists() or spec.labels:
            return None
        machine = self._pool.take(spec)
        if machine is None or machine.adopt(spec.workspace_id, files, spec.claim):
            return machine
        await machine.stop(0)
        return None

    async def _make(self, spec: MachineSpec) -> DockerMachine:
        """A new container: the workspace's, or nobody's yet."""
        name = f"helmr-{spec.workspace_id or 'pool'}-{ids.new('m')[-8:]}"
        folder = MachineFolder(self._home, name.rpartition("-")[2])
        self._workers.add(spec.worker_id)
        self._folders.add(folder.path.name)
        try:
            ref = await self._boot.start(spec, name, folder)
            channel = await self._boot.greet(spec, ref, folder)
            egress = await self._let_out(spec.workspace_id, spec.network, folder)
        except BaseException:
            # By name: a creation that timed out may have happened all the same.
            try:
                await asyncio.shield(self._undo(name, folder))
            except HelmrError as failure:
                log.warning("the container %s cannot be removed now: %s", name, failure)
            finally:
                self._folders.discard(folder.path.name)
            raise
        return self._machine(MachineRecord.of(spec), ref, channel, folder, egress)

    def _machine(
        self, record: MachineRecord, ref: str, channel: Channel, folder: MachineFolder, egress: Egress | None
    ) -> DockerMachine:
        return DockerMachine(
            record, ref, channel, folder, containers=self._containers, egress=egress, forget=self._forget
        )

    async def inherit(self, worker_id: str, living: set[str]) -> list[Inheritance]:
        """Take over the containers of dead workers that are still alive; see :meth:`worker.engine.Engine.inherit`."""
        running = [each for each in await self._containers.list() if each.running]
        taken = await asyncio.gather(*(self._inherit(each, worker_id, living) for each in running))
        return [each for each in taken if each is not None]

    async def _inherit(self, found: Container, worker_id: str, living: set[str]) -> Inheritance | None:
        folder = MachineFolder(self._home, found.folder)
        record = await asyncio.to_thread(machine_record.seize, folder.path, worker_id, living)
        if record is None:
            return None
        self._workers.add(worker_id)
        self._folders.add(found.folder)
        try:
            channel = await reach(folder, worker_id)
            egress = await self._let_out(record.workspace_id, record.network, folder)
        except HelmrError as error:
            log.info("container %s cannot be taken over: %s", found.ref, error)
            self._folders.discard(found.folder)
            await self._undo(found.id, folder)
            return None
        machine = self._machine(msgspec.structs.replace(record, worker=worker_id), found.ref, channel, folder, egress)
        machine.adopted = found.made_for != record.workspace_id
        self._machines[machine.workspace_id] = machine
        return Inheritance(machine, record.worker, channel.attached)

    async def delete(self, workspace_id: str) -> None:
        """Remove the workspace's containers and its files."""
        async with self._locks[workspace_id]:
            await self._clear(workspace_id)
            try:
                await asyncio.to_thread(remove_files, self._home, workspace_id)
            except PermissionError:
                # They belong to the user of the tasks; root in a container may remove them when this worker may not.
                image = await self._images.ensure(ImageSpec(), lambda _: None)
                await self._containers.remove_files(workspace_id, image)

    async def collect(self, live_workers: set[str], *, spare_running: bool = False) -> list[str]:
        """Remove the containers of workers that are gone, those that we gave up, and folders that no container uses."""
        found = await self._containers.list()
        dead = [
            each
            for each in found
            if each.record.worker not in live_workers
            and not (spare_running and each.running and each.record.workspace_id)
        ]
        given_up = [each for each in found if self._gave_up(each)]
        gone = await asyncio.gather(*(self._remove_dead(each, live_workers) for each in dead))
        await asyncio.gather(*(self._containers.remove(each.id) for each in given_up))
        removed = [*given_up, *(each for each, done in zip(dead, gone, strict=True) if done)]
        kept = {each.folder for each in found if each not in removed} | self._folders
        await asyncio.to_thread(sweep, self._home, kept)
        await self._images.collect()
        return [each.ref for each in removed]

    async def _remove_dead(self, container: Container, live_workers: set[str]) -> bool:
        """Remove a dead worker's container, unless somebody has just taken it over."""
        folder = MachineFolder(self._home, container.folder).path
        with machine_record.held(folder) as alone:
            record = machine_record.read(folder)
            if folder.exists() and (not alone or (record is not None and record.worker in live_workers)):
                return False
            await self._containers.remove(container.id)
            return True

    def _gave_up(self, container: Container) -> bool:
        """Whether a container is ours and nobody's: the engine was away when it had to go, or made it after we had left."""
        return container.record.worker in self._workers and container.folder not in self._folders

    async def close(self) -> None:
        """Stop every machine of this engine, then let go of the engine itself."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pool.close())
                for machine in list(self._machines.values()):
                    group.create_task(machine.stop())
        finally:
            await self._api.close()

    # The life of a container

    def _forget(self, machine: DockerMachine) -> None:
        """Take note that a machine is being stopped."""
        self._folders.discard(machine.folder.path.name)
        if self._machines.get(machine.workspace_id) is machine:
            del self._machines[machine.workspace_id]

    async def _clear(self, workspace_id: str, *, claim: float = math.inf) -> None:
        """Remove every container that has the workspace's files, of claims up to this one: two would both write to them."""
        machine = self._machines.get(workspace_id)
        if machine is not None:
            await machine.stop(0)
        found = [each for each in await self._containers.list() if each.record.workspace_id == workspace_id]
        if any(each.record.claim > claim for each in found):
            raise superseded(workspace_id)
        for each in found:
            await self._containers.remove(each.id)

    async def _let_out(self, workspace_id: str, network: Network, folder: MachineFolder) -> Egress | None:
        """Serve the machine's way out, if it is to have one."""
        if network == "none":
            return None
        hosts = None if network == "internet" else network
        egress = Egress(workspace_id, Rules(hosts, self._neighbourhood))
        await egress.open(folder.socket("way-out"))
        return egress

    async def _undo(self, name: str, folder: MachineFolder) -> None:
        await self._containers.remove(name)
        await asyncio.to_thread(folder.remove)


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    """What an operator should know about this engine."""
    cgroup = str(facts.get("CgroupVersion", "1"))
    yield f"cgroup v{cgroup}"
    if not facts.get("MemoryLimit", True) or not facts.get("PidsLimit", True):
        yield "memory or process limits are not enforced on this host"
    if any("rootless" in option for option in facts.get("SecurityOptions") or ()):
        yield "rootless engine"
    if not str(connection()["base_url"]).startswith("unix:"):
        yield "the engine is reached over the network: it must see this machine's HELMR_HOME under the same path"
