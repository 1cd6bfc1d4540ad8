"""The engine without isolation: a supervisor as a plain child process, a workspace as a plain folder.

It exists so that Helmr can be tried without a container engine, and so that most tests are quick. Tasks run as the worker's
own user, with its files and its network; nothing limits what they use. :meth:`ProcessEngine.check` says so.

A supervisor outlives a killed worker for :data:`ORPHAN_TIMEOUT` seconds. Its process id stands in a file beside its socket,
together with the start time that tells it from a later process of the same number, so that the next worker of this home
can end it before it uses the workspace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import platform
import re
import select
import shutil
import signal
import sys
from collections import defaultdict
from pathlib import Path

import msgspec

import helmr.guest
from helmr.errors import EngineUnavailable, HelmrError, Unavailable, UsageError
from helmr.guest import tree
from worker import machine_record
from worker.channel import Channel, ChannelProcess
from worker.engine import (
    BuildSecrets,
    EngineInfo,
    ImageSpec,
    Inheritance,
    MachineSpec,
    ProcessSpec,
    Progress,
    superseded,
)
from worker.host import host_id
from worker.left_supervisor import LeftSupervisor
from worker.machine_folder import MachineFolder
from worker.machine_record import MachineRecord
from worker.silence import end_when_silent

log = logging.getLogger(__name__)

#: Seconds that a supervisor lives on without a worker.
ORPHAN_TIMEOUT = 20.0
#: Seconds from the start of a supervisor until it must have answered; 0.05 on a quiet machine.
_READY = 15.0
#: Seconds in which one that has long been there must answer.
_REACH = 5.0
#: Seconds that a supervisor may take to end beyond the grace given to processes.
_STOP_MARGIN = 3.0
#: What tasks get of the worker's environment: where programs, certificates and proxies are. Never its credentials.
_INHERITED = re.compile(r"PATH|TZ|TMPDIR|SSL_CERT_(FILE|DIR)|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY")
#: What may be the name of a folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RECORD = "supervisor.json"
_LOG = "supervisor.log"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor of a machine folder, for whoever comes later."""

    pid: int
    born: str


class ProcessMachine:
    """A supervisor process and the folder it works in (:class:`worker.engine.Machine`)."""

    def __init__(
        self,
        record: MachineRecord,
        process: asyncio.subprocess.Process | LeftSupervisor,
        channel: Channel,
        folder: MachineFolder,
    ) -> None:
        self.workspace_id = record.workspace_id
        self._record = record
        self.ref = str(process.pid)
        self.adopted = False
        self._process = process
        self._channel = channel
        self.folder = folder
        self._stopping: asyncio.Task[None] | None = None
        self._minding = asyncio.create_task(end_when_silent(channel, self._kill))

    def sources(self) -> set[str]:
        """The names of the sources that were delivered."""
        return self.folder.sources_there()

    def claimed(self, claim: int) -> None:
        """Take note of the claim that the machine is kept under now."""
        self._record = msgspec.structs.replace(self._record, claim=claim)
        machine_record.write(self.folder.path, self._record)

    async def put_source(self, name: str, tree: Path) -> None:
        """Copy the folder ``tree`` into the machine's own folder; doing it twice is free."""
        await self.folder.put_source(name, tree)

    async def start(self, spec: ProcessSpec) -> ChannelProcess:
        """Start a process tree; see :meth:`worker.engine.Machine.start`."""
        return await self._channel.start(spec)

    async def stop(self, grace: float = 2.0) -> None:
        """End every process and the supervisor; the workspace's folder stays."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await asyncio.shield(self._stopping)

    async def wait_lost(self) -> str:
        """Return, with the reason, when the supervisor has ended or hung up."""
        reason = await self._channel.wait_lost()
        with contextlib.suppress(TimeoutError):
            code = await asyncio.wait_for(self._process.wait(), 1.0)
            if code < 0:
                return f"the supervisor was ended by {signal.Signals(-code).name}"
        return reason

    async def _kill(self) -> None:
        await _reap(self._process)

    async def _stop(self, grace: float) -> None:
        try:
            if self._channel.lost and self._process.returncode is None:
                self._process.terminate()  # another worker took over, or it hung up: SIGTERM it still obeys
            self._channel.stop(grace)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace + _STOP_MARGIN)
        finally:
            self._minding.cancel()
            self._channel.close("the machine was stopped")
            await _reap(self._process)
            await asyncio.to_thread(self.folder.remove)


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
        self._runner = runner
        self._environment = environment or {}
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
                machine = await self._boot(spec, workspace, folder)
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
        process = _read_record(folder.run / _RECORD)
        if process is None or not _is_alive(folder):
            return None
        record = machine_record.seize(folder.path, worker_id, living)
        if record is None:
            return None
        try:
            supervisor = LeftSupervisor(process.pid)
            channel = await Channel.connect(folder.socket(), client=worker_id, ready_within=_REACH)
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

    async def _boot(self, spec: MachineSpec, workspace: Path, folder: MachineFolder) -> ProcessMachine:
        folder.create()
        try:
            machine_record.write(folder.path, MachineRecord.of(spec))
            return await self._start(spec, workspace, folder)
        except FileNotFoundError as error:
            if folder.run.exists():
                raise
            raise superseded(spec.workspace_id) from error

    async def _start(self, spec: MachineSpec, workspace: Path, folder: MachineFolder) -> ProcessMachine:
        process = await self._spawn(spec, workspace, folder)
        try:
            record = _Record(pid=process.pid, born=_born(process.pid))
            (folder.run / _RECORD).write_bytes(msgspec.json.encode(record))
            channel = await self._greet(spec, process, folder)
        except BaseException:
            await asyncio.shield(_reap(process))
            raise
        return ProcessMachine(MachineRecord.of(spec), process, channel, folder)

    async def _greet(self, spec: MachineSpec, process: asyncio.subprocess.Process, folder: MachineFolder) -> Channel:
        """Connect to the supervisor as soon as it listens, unless it ends first."""
        connecting = asyncio.ensure_future(Channel.connect(folder.socket(), client=spec.worker_id, ready_within=_READY))
        ending = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait([connecting, ending], return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                return connecting.result()
        finally:
            connecting.cancel()
            ending.cancel()
        path = folder.run / _LOG
        log = path.read_text(errors="replace").strip() if path.exists() else ""
        raise EngineUnavailable(
            f"the supervisor does not start: {log.splitlines()[-1] if log else 'it ended without a word'}",
            details={"log": log},
        )

    async def _spawn(self, spec: MachineSpec, workspace: Path, folder: MachineFolder) -> asyncio.subprocess.Process:
        script = Path(helmr.guest.__file__).with_name("boot.py")
        options = {
            "socket": "socket",  # relative to its working folder: the path of a unix socket must be short
            "workspace": str(workspace),
            "workspace-id": spec.workspace_id,
            "sources": str(folder.sources),
            "home": str(folder.path / "home"),
            "secret-root": str(folder.run / "secrets"),
            "orphan-timeout": str(ORPHAN_TIMEOUT),
            "runner": self._runner,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with (folder.run / _LOG).open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-B", str(script), *words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                cwd=folder.run,
                env=self._clean_environment(),
                start_new_session=True,  # Ctrl-C is for the worker, which then ends its machines in good order
            )

    def _clean_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}
        python = str(Path(sys.executable).parent)
        return {**inherited, "PATH": f"{python}:{inherited.get('PATH', os.defpath)}", **self._environment}

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
        record = _read_record(folder.run / _RECORD)
        ended = record is not None and await asyncio.to_thread(_end, record)
        await asyncio.to_thread(folder.remove)
        return [str(record.pid)] if record is not None and ended else []


async def _reap(process: asyncio.subprocess.Process | LeftSupervisor) -> None:
    """End a supervisor that has not ended by itself, with all that is below it, and wait for it."""
    if process.returncode is None:
        await asyncio.to_thread(tree.kill, [process.pid])
    await process.wait()


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
    process = _read_record(folder.run / _RECORD)
    return process is not None and bool(process.born) and _born(process.pid) == process.born


def _read_record(path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _born(pid: int) -> str:
    """When a process was started, in the kernel's own count; empty if it is gone or the platform does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in {"Z", "X"} else fields[19]


def _end(record: _Record) -> bool:
    """Terminate a supervisor that may not be our child, at last by force; False if it had ended before."""
    if not record.born or _born(record.pid) != record.born:
        return False
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if select.select([handle], [], [], 2.0 + _STOP_MARGIN)[0]:
            return True
        tree.kill([record.pid])  # with what is below it, be it stopped or not
        if select.select([handle], [], [], _STOP_MARGIN)[0]:
            return True
    except ProcessLookupError:
        return True
    finally:
        os.close(handle)
    raise Unavailable(f"the supervisor {record.pid}, left by an earlier worker, does not end")


def _delete_tree(folder: Path) -> None:
    """Delete a folder, whatever permissions tasks gave to what is in it."""
    folder.chmod(0o700)
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)
