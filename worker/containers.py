"""The machines' containers of one Helmr home: found by their labels, told apart by the records beside them, removed.

Ownership is by label at first: ``helmr.install`` names the host's Helmr home, ``helmr.worker`` the worker, ``helmr.workspace``
the workspace. Labels cannot be changed, though, so what a record says counts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
from docker import APIClient
from docker.types import Mount

from helmr.errors import HelmrError, NotFound
from worker import machine_record
from worker.container_spec import CLAIM, INSTALL, KIND, WORKER, WORKSPACE
from worker.docker_api import DockerApi, remove_container
from worker.machine_folder import workspace_files
from worker.machine_record import MachineRecord

#: Seconds the engine gets to tell how a container ended, which is good to know, and nothing that anybody should wait for.
_EXPLAIN_PATIENCE = 5.0


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """One of them, as the engine has just listed it."""

    id: str
    running: bool
    #: The name of the folder of its machine, below ``<home>/machines``.
    folder: str
    #: Whose it is; made up from the labels, which do not tell its network, if it has none.
    record: MachineRecord
    #: The workspace that it was made for; empty: nobody's, it was started ahead.
    made_for: str

    @property
    def ref(self) -> str:
        """The id as people write it."""
        return short(self.id)


class Containers:
    """Those of the home with the id ``install``."""

    def __init__(self, api: DockerApi, home: Path, install: str) -> None:
        self._api = api
        self._home = home
        self._install = install

    async def list(self) -> list[Container]:
        """All of them, running or not."""
        filters = {"label": [f"{INSTALL}={self._install}", f"{KIND}=machine"]}
        found: list[dict[str, Any]] = await self._api.call(lambda client: client.containers(all=True, filters=filters))
        # After that: each record is there before its container.
        known = await asyncio.to_thread(machine_record.records, self._home / "machines")
        return [_container(item, known) for item in found]

    async def remove(self, ref: str) -> None:
        """Kill and remove a container; return when it is gone."""
        await remove_container(self._api, ref)

    async def explain(self, ref: str) -> str:
        """How a container ended, in a few words; empty if it is running, or gone for good."""
        try:
            state = await self.ended(ref)
        except HelmrError as error:
            return error.message
        return how(state) if state is not None else ""

    async def ended(self, ref: str) -> dict[str, Any] | None:
        """The state of a container that has ended; None: it has not, or is gone for good."""
        try:
            found = await self._api.call(lambda client: client.inspect_container(ref), patience=_EXPLAIN_PATIENCE)
        except NotFound:
            return None
        state: dict[str, Any] = found["State"]
        return None if state["Running"] else state

    async def remove_files(self, workspace_id: str, image: str) -> None:
        """Remove a workspace's files as root, in a container of ``image``, when this worker may not."""
        mount = Mount("/workspaces", str(workspace_files(self._home, workspace_id).parent), type="bind")
        script = f"import shutil; shutil.rmtree('/workspaces/{workspace_id}')"
        labels = {INSTALL: self._install, KIND: "cleaner"}

        def remove(client: APIClient) -> None:
            host_config = client.create_host_config(mounts=[mount], network_mode="none")
            command = ["python3", "-c", script]
            ref = client.create_container(image, command, labels=labels, host_config=host_config)["Id"]
            try:
                client.start(ref)
                client.wait(ref)
            finally:
                client.remove_container(ref, force=True)

        await self._api.call(remove)


def _container(item: dict[str, Any], known: dict[str, MachineRecord]) -> Container:
    labels, folder = item["Labels"], str(item["Names"][0]).rpartition("-")[2]
    made_for = str(labels.get(WORKSPACE, ""))
    record = known.get(folder) or MachineRecord(
        worker=str(labels.get(WORKER, "")), workspace_id=made_for, claim=int(labels.get(CLAIM, 0)), network="none"
    )
    running = item.get("State") == "running"
    return Container(id=item["Id"], running=running, folder=folder, record=record, made_for=made_for)


def how(state: dict[str, Any]) -> str:
    """How a container ended, by its state."""
    memory = ", out of memory" if state["OOMKilled"] else ""
    return f"the container ended with exit code {state['ExitCode']}{memory}"


def short(container_id: str) -> str:
    """A container's id as people write it."""
    return container_id[:12]
