"""Boots a supervisor as a plain child process, and waits until it answers; says why when it does not."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import helmr.guest
from helmr.errors import EngineUnavailable
from worker import machine_record, supervisor_record
from worker.channel import Channel
from worker.engine import MachineSpec, superseded
from worker.machine_folder import MachineFolder
from worker.machine_record import MachineRecord
from worker.process_machine import ProcessMachine, reap

#: Seconds that a supervisor lives on without a worker.
ORPHAN_TIMEOUT = 20.0
#: Seconds from the start of a supervisor until it must have answered; 0.05 on a quiet machine.
_READY = 15.0
#: What tasks get of the worker's environment: where programs, certificates and proxies are. Never its credentials.
_INHERITED = re.compile(r"PATH|TZ|TMPDIR|SSL_CERT_(FILE|DIR)|(https?|no|all)_proxy|(HTTPS?|NO|ALL)_PROXY")
_LOG = "supervisor.log"


class ProcessBoot:
    """Boots supervisors that hand tasks to ``runner``; ``environment`` is added to what every process gets."""

    def __init__(self, runner: str, environment: dict[str, str]) -> None:
        self._runner = runner
        self._environment = environment

    async def boot(self, spec: MachineSpec, workspace: Path, folder: MachineFolder) -> ProcessMachine:
        """A live supervisor on the folder ``workspace``.

        Raises:
            EngineUnavailable: it does not start.
            Unavailable: another supervisor takes the workspace just now.
        """
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
            supervisor_record.note(folder.run, process.pid)
            channel = await _greet(spec, process, folder)
        except BaseException:
            await asyncio.shield(reap(process))
            raise
        return ProcessMachine(MachineRecord.of(spec), process, channel, folder)

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


async def _greet(spec: MachineSpec, process: asyncio.subprocess.Process, folder: MachineFolder) -> Channel:
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
