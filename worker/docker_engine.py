"""The real engine: one Docker container per live workspace, its files in a folder of the host that outlives every container.

The SDK creates, inspects and removes; everything a task does goes over the supervisor's socket. Ownership is by label:
``helmr.install`` names the host's Helmr home, ``helmr.worker`` the worker, ``helmr.workspace`` the workspace.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from docker import APIClient
from docker.types import Mount

from helmr import ids
from helmr.errors import EngineUnavailable, HelmrError, ImageError, NotFound, Unavailable
from worker import machine_record
from worker.channel import Channel, ChannelProcess
from worker.container_spec import CLAIM, INSTALL, KIND, WORKER, WORKSPACE, HostSide, container, task_owner
from worker.docker_api import DockerApi, connection, remove_container
from worker.egress import Egress
from worker.egress_rules import Neighbourhood, Rules
from worker.engine import (
    BuildSecrets,
    EngineInfo,
    ImageGone,
    ImageSpec,
    Inheritance,
    MachineSpec,
    Network,
    ProcessSpec,
    Progress,
    Provision,
    superseded,
)
from worker.host import host_id, writing
from worker.images import Images
from worker.machine_folder import (
    MachineFolder,
    library,
    remove_files,
    rename_unless_there,
    sweep,
    workspace_files,
)
from worker.machine_record import MachineRecord
from worker.pool import Pool
from worker.silence import end_when_silent

log = logging.getLogger(__name__)

#: Seconds in which a supervisor that has long been there must answer.
_REACH = 5.0
#: Seconds from the start of a container until its supervisor must have answered; 0.05 on a quiet machine.
READY_TIMEOUT = 30.0
#: Seconds between looks at a booting container: has it died instead of answering?
_LOOK = 0.15
#: Seconds that the engine and the supervisor may take beyond the grace given to processes.
_STOP_MARGIN = 3.0
#: Seconds the engine gets to tell how a container ended, which is good to know, and nothing that anybody should wait for.
_EXPLAIN_PATIENCE = 5.0
#: Exit codes of a supervisor that was killed, or told to end, from outside: no fault of its image.
_ENDED_FROM_OUTSIDE = {137, 143}


class DockerMachine:
    """A live container with a supervisor in it (:class:`worker.engine.Machine`)."""

    def __init__(
        self,
        engine: DockerEngine,
        record: MachineRecord,
        ref: str,
        *,
        channel: Channel,
        folder: MachineFolder,
        egress: Egress | None,
    ) -> None:
        self.workspace_id = record.workspace_id
        self.ref = ref
        self._record = record
        self._engine = engine
        self._channel = channel
        self._egress = egress
        self.folder = folder
        self.adopted = False
        self._stopping: asyncio.Task[None] | None = None
        self._minding = asyncio.create_task(end_when_silent(channel, self._kill))

    @property
    def lost(self) -> bool:
        """Whether it has ended."""
        return bool(self._channel.lost)

    @property
    def folder_name(self) -> str:
        """The name of its folder below ``<home>/machines``."""
        return self.folder.path.name

    def sources(self) -> set[str]:
        """The names of the sources that were delivered."""
        return self.folder.sources_there()

    def claimed(self, claim: int) -> None:
        """Take note of the claim that the machine is kept under now."""
        self._note(claim=claim)

    def _note(self, **changes: Any) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        machine_record.write(self.folder.path, self._record)

    async def put_source(self, name: str, tree: Path) -> None:
        """Make a copy of the folder ``tree`` readable to tasks as source ``name``; doing it twice is free."""
        await self.folder.put_source(name, tree)

    async def provide(self, provision: Provision) -> None:
        """Have the code of a deployment ready in a machine that is nobody's yet."""
        await self.put_source(provision.source, provision.tree)
        if provision.template is not None:
            self._channel.make_template(provision.template)

    async def start(self, spec: ProcessSpec) -> ChannelProcess:
        """Start a process tree; see :meth:`worker.engine.Machine.start`."""
        if self.adopted:
            # Its supervisor was started before anybody knew whose it would be.
            env = {"HELMR_WORKSPACE_ID": self.workspace_id, **spec.env}
            spec = msgspec.structs.replace(spec, env=env)
        return await self._channel.start(spec)

    def adopt(self, workspace_id: str, files: Path, claim: int) -> bool:
        """Make a machine that is nobody's the workspace's, its empty folder the one at ``files``; False if there is one."""
        self._note(workspace_id=workspace_id, claim=claim)
        try:
            files.parent.mkdir(parents=True, exist_ok=True)
            rename_unless_there(self.folder.files, files)  # what is mounted is the folder, by whatever name
        except OSError:
            return False
        self.adopted = True
        self.workspace_id = workspace_id
        if self._egress is not None:
            self._egress.name = workspace_id
        return True

    async def stop(self, grace: float = 2.0) -> None:
        """End every process and the container; the files stay."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def wait_lost(self) -> str:
        """Return, with the reason, when the container has ended."""
        reason = await self._channel.wait_lost()
        return await self._engine.explain(self.ref) or reason

    async def _kill(self) -> None:
        await self._engine.remove(self.ref)

    async def _stop(self, grace: float) -> None:
        try:
            self._channel.stop(grace)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._channel.wait_lost(), grace + _STOP_MARGIN)
        finally:
            self._minding.cancel()
            self._channel.close("the machine was stopped")
            if self._egress is not None:
                await self._egress.close()
            self._engine.forget(self)
            await self._remove()

    async def _remove(self) -> None:
        try:
            await self._engine.remove(self.ref)
        except HelmrError as error:
            # Nobody is there for its supervisor any more, which ends it; what is left goes when leftovers are looked for.
            log.warning("the container %s cannot be removed now: %s", self.ref, error)
            self.folder.close()
        else:
            await asyncio.to_thread(self.folder.remove)


class DockerEngine:
    """Machines as Docker containers (:class:`worker.engine.Engine`)."""

    name = "docker"

    def __init__(self, home: Path, neighbourhood: Neighbourhood | None = None, *, pool: int = 0) -> None:
        self._home = home.absolute()
        self._neighbourhood = neighbourhood or Neighbourhood.of()
        self._api = DockerApi()
        self._images = Images(self._api, self._home, self.install)
        self._machines: dict[str, DockerMachine] = {}
        self._workers: set[str] = set()
        #: Folders of the containers that are being made, or are somebody's: a container without is nobody's.
        self._folders: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._facts: dict[str, Any] = {}
        self._library: Path | None = None
        self._pool: Pool[DockerMachine] = Pool(self._make, pool)

    @functools.cached_property
    def install(self) -> str:
        """What our containers are labelled with: the id of this home on this host."""
        return host_id(self._home)

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
            ref = await self._start(spec, name, folder)
            channel = await self._greet(spec, ref, folder)
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
        return DockerMachine(self, MachineRecord.of(spec), ref, channel=channel, folder=folder, egress=egress)

    async def inherit(self, worker_id: str, living: set[str]) -> list[Inheritance]:
        """Take over the containers of dead workers that are still alive; see :meth:`worker.engine.Engine.inherit`."""
        found = await self._list({INSTALL: self.install, KIND: "machine"})
        running = [item for item in found if item["State"] == "running"]
        taken = await asyncio.gather(*(self._inherit(item, worker_id, living) for item in running))
        return [each for each in taken if each is not None]

    async def _inherit(self, item: dict[str, Any], worker_id: str, living: set[str]) -> Inheritance | None:
        folder = MachineFolder(self._home, _folder_name(item))
        record = await asyncio.to_thread(machine_record.seize, folder.path, worker_id, living)
        if record is None:
            return None
        self._workers.add(worker_id)
        self._folders.add(folder.path.name)
        try:
            channel = await Channel.connect(folder.socket(), client=worker_id, ready_within=_REACH)
            egress = await self._let_out(record.workspace_id, record.network, folder)
        except HelmrError as error:
            log.info("container %s cannot be taken over: %s", _ref(item["Id"]), error)
            self._folders.discard(folder.path.name)
            await self._undo(item["Id"], folder)
            return None
        mine = msgspec.structs.replace(record, worker=worker_id)
        machine = DockerMachine(self, mine, _ref(item["Id"]), channel=channel, folder=folder, egress=egress)
        machine.adopted = item["Labels"].get(WORKSPACE) != record.workspace_id
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
                await self._remove_as_root(workspace_id)

    async def collect(self, live_workers: set[str], *, spare_running: bool = False) -> list[str]:
        """Remove the containers of workers that are gone, those that we gave up, and folders that no container uses."""
        found = await self._list({INSTALL: self.install, KIND: "machine"})
        known = await asyncio.to_thread(machine_record.records, self._home / "machines")
        dead = [
            item
            for item in found
            if _record_of(item, known).worker not in live_workers
            and not (spare_running and item["State"] == "running" and _record_of(item, known).workspace_id)
        ]
        given_up = [item for item in found if self._gave_up(item, known)]
        gone = await asyncio.gather(*(self._remove_dead(item, live_workers) for item in dead))
        await asyncio.gather(*(self.remove(item["Id"]) for item in given_up))
        removed = [*given_up, *(item for item, done in zip(dead, gone, strict=True) if done)]
        kept = {_folder_name(item) for item in found if item not in removed} | self._folders
        await asyncio.to_thread(sweep, self._home, kept)
        await self._images.collect()
        return [_ref(item["Id"]) for item in removed]

    async def _remove_dead(self, item: dict[str, Any], live_workers: set[str]) -> bool:
        """Remove a dead worker's container, unless somebody has just taken it over."""
        folder = MachineFolder(self._home, _folder_name(item)).path
        with machine_record.held(folder) as alone:
            record = machine_record.read(folder)
            if folder.exists() and (not alone or (record is not None and record.worker in live_workers)):
                return False
            await self.remove(item["Id"])
            return True

    def _gave_up(self, item: dict[str, Any], known: _Records) -> bool:
        """Whether a container is ours and nobody's: the engine was away when it had to go, or made it after we had left."""
        return _record_of(item, known).worker in self._workers and _folder_name(item) not in self._folders

    async def close(self) -> None:
        """Stop every machine of this engine, then let go of the engine itself."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pool.close())
                for machine in list(self._machines.values()):
                    group.create_task(machine.stop())
        finally:
            await self._api.close()

    # For the machines

    def forget(self, machine: DockerMachine) -> None:
        """Take note that a machine is being stopped."""
        self._folders.discard(machine.folder_name)
        if self._machines.get(machine.workspace_id) is machine:
            del self._machines[machine.workspace_id]

    async def remove(self, ref: str) -> None:
        """Kill and remove a container; return when it is gone."""
        await remove_container(self._api, ref)

    async def explain(self, ref: str) -> str:
        """How a container ended, in a few words; empty if it is running, or gone for good."""
        try:
            state = await self._ended(ref)
        except HelmrError as error:
            return error.message
        return _how(state) if state is not None else ""

    async def _ended(self, ref: str) -> dict[str, Any] | None:
        """The state of a container that has ended; None: it has not, or is gone for good."""
        try:
            found = await self._api.call(lambda client: client.inspect_container(ref), patience=_EXPLAIN_PATIENCE)
        except NotFound:
            return None
        state: dict[str, Any] = found["State"]
        return None if state["Running"] else state

    async def _remove_as_root(self, workspace_id: str) -> None:
        image = await self._images.ensure(ImageSpec(), lambda _: None)
        mount = Mount("/workspaces", str(workspace_files(self._home, workspace_id).parent), type="bind")

        def remove(client: APIClient) -> None:
            script = f"import shutil; shutil.rmtree('/workspaces/{workspace_id}')"
            host_config = client.create_host_config(mounts=[mount], network_mode="none")
            labels = {INSTALL: self.install, KIND: "cleaner"}
            ref = client.create_container(image, ["python3", "-c", script], labels=labels, host_config=host_config)[
                "Id"
            ]
            try:
                client.start(ref)
                client.wait(ref)
            finally:
                client.remove_container(ref, force=True)

        await self._api.call(remove)

    # The life of a container

    async def _clear(self, workspace_id: str, *, claim: float = math.inf) -> None:
        """Remove every container that has the workspace's files, of claims up to this one: two would both write to them."""
        machine = self._machines.get(workspace_id)
        if machine is not None:
            await machine.stop(0)
        known = await asyncio.to_thread(machine_record.records, self._home / "machines")
        listed = await self._list({INSTALL: self.install, KIND: "machine"})
        found = {
            item["Id"]: record for item in listed if (record := _record_of(item, known)).workspace_id == workspace_id
        }
        if any(record.claim > claim for record in found.values()):
            raise superseded(workspace_id)
        for ref in found:
            await self.remove(ref)

    async def _list(self, labels: dict[str, str]) -> list[dict[str, Any]]:
        filters = {"label": [f"{name}={value}" for name, value in labels.items()]}
        found: list[dict[str, Any]] = await self._api.call(lambda client: client.containers(all=True, filters=filters))
        return found

    async def _start(self, spec: MachineSpec, name: str, folder: MachineFolder) -> str:
        if not self._facts:
            await self.check()
        with writing(self._home):
            if self._library is None:
                self._library = await asyncio.to_thread(library, self._home)
            folder.create()
            machine_record.write(folder.path, MachineRecord.of(spec))
            files = workspace_files(self._home, spec.workspace_id) if spec.workspace_id else folder.files
            files.mkdir(parents=True, exist_ok=True)
        host = HostSide(
            install=self.install,
            name=name,
            library=self._library,
            run=folder.run,
            sources=folder.sources,
            files=files,
            cpus=int(self._facts["NCPU"]),
        )

        def create_and_start(client: APIClient) -> str:
            ref: str = client.create_container(**container(client, spec, host))["Id"]
            client.start(ref)
            return ref

        try:
            return _ref(await self._api.call(create_and_start))
        except HelmrError as error:
            self._images.forget()
            raise _start_error(spec.image, error) from error

    async def _greet(self, spec: MachineSpec, ref: str, folder: MachineFolder) -> Channel:
        """Connect to the supervisor as soon as it listens, unless the container ends first."""
        connecting = asyncio.ensure_future(
            Channel.connect(folder.socket(), client=spec.worker_id, ready_within=READY_TIMEOUT)
        )
        try:
            while not (await asyncio.wait([connecting], timeout=_LOOK))[0]:
                if (state := await self._ended(ref)) is not None:
                    raise await self._stillborn(spec.image, ref, state)
            return connecting.result()
        finally:
            connecting.cancel()

    async def _let_out(self, workspace_id: str, network: Network, folder: MachineFolder) -> Egress | None:
        """Serve the machine's way out, if it is to have one."""
        if network == "none":
            return None
        hosts = None if network == "internet" else network
        egress = Egress(workspace_id, Rules(hosts, self._neighbourhood))
        await egress.open(folder.socket("way-out"))
        return egress

    async def _stillborn(self, image: str, ref: str, state: dict[str, Any]) -> HelmrError:
        if state["ExitCode"] in _ENDED_FROM_OUTSIDE and not state["OOMKilled"]:
            return Unavailable(f"{_how(state)} while it was starting")
        said = await self._api.call(lambda client: client.logs(ref, tail=30))
        text = said.decode(errors="replace").strip()
        return ImageError(
            f"no machine can be made of the image {image}: {_how(state)}{': ' + text.splitlines()[-1] if text else ''}",
            hint="the image needs a working python3, 3.10 or newer",
            details={"log": text},
        )

    async def _undo(self, name: str, folder: MachineFolder) -> None:
        await self.remove(name)
        await asyncio.to_thread(folder.remove)


def _how(state: dict[str, Any]) -> str:
    """How a container ended, by its state."""
    memory = ", out of memory" if state["OOMKilled"] else ""
    return f"the container ended with exit code {state['ExitCode']}{memory}"


def _ref(container_id: str) -> str:
    """A container's id as people write it."""
    return container_id[:12]


def _folder_name(item: dict[str, Any]) -> str:
    """The name of the folder of a container's machine, below ``<home>/machines``."""
    return str(item["Names"][0]).rpartition("-")[2]


_Records = Mapping[str, MachineRecord]


def _record_of(item: dict[str, Any], known: _Records) -> MachineRecord:
    """Whose a container is: what its record says counts, because labels cannot be changed; they do not tell its network."""
    labels = item["Labels"]
    return known.get(_folder_name(item)) or MachineRecord(
        worker=str(labels.get(WORKER, "")),
        workspace_id=str(labels.get(WORKSPACE, "")),
        claim=int(labels.get(CLAIM, 0)),
        network="none",
    )


def _start_error(image: str, error: HelmrError) -> HelmrError:
    if "executable file not found" in error.message or "python3: no such file" in error.message:
        return ImageError(
            f"image {image} has no python3 (>= 3.10)", hint="use a base image with Python, or install it in a step"
        )
    if "such image" in error.message.lower():
        return ImageGone(
            f"the image {image} is not on this machine any more", hint="try again: it will be built or pulled anew"
        )
    return error


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
