"""A machine that is a Docker container: made for a workspace, adopted by one, or taken over from a dead worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from helmr.errors import HelmrError
from worker.channel import Channel, ChannelProcess
from worker.containers import Containers
from worker.egress import Egress
from worker.engine import ProcessSpec, Provision
from worker.machine_folder import MachineFolder, rename_unless_there
from worker.machine_record import MachineRecord
from worker.supervised_machine import STOP_MARGIN, SupervisedMachine

log = logging.getLogger(__name__)


class DockerMachine(SupervisedMachine):
    """A live container with a supervisor in it (:class:`worker.engine.Machine`); ``forget`` is told when it is stopped."""

    def __init__(
        self,
        record: MachineRecord,
        ref: str,
        channel: Channel,
        folder: MachineFolder,
        *,
        containers: Containers,
        egress: Egress | None,
        forget: Callable[[DockerMachine], None],
    ) -> None:
        super().__init__(record, ref, channel, folder)
        self._containers = containers
        self._egress = egress
        self._forget = forget

    @property
    def lost(self) -> bool:
        """Whether it has ended."""
        return bool(self._channel.lost)

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

    async def wait_lost(self) -> str:
        """Return, with the reason, when the container has ended."""
        reason = await self._channel.wait_lost()
        return await self._containers.explain(self.ref) or reason

    async def _kill(self) -> None:
        await self._containers.remove(self.ref)

    async def _end(self, grace: float) -> None:
        self._channel.stop(grace)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._channel.wait_lost(), grace + STOP_MARGIN)

    async def _remove(self) -> None:
        if self._egress is not None:
            await self._egress.close()
        self._forget(self)
        try:
            await self._containers.remove(self.ref)
        except HelmrError as error:
            # Nobody is there for its supervisor any more, which ends it; what is left goes when leftovers are looked for.
            log.warning("the container %s cannot be removed now: %s", self.ref, error)
            self.folder.close()
        else:
            await asyncio.to_thread(self.folder.remove)
