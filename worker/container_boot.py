"""Boots a machine's container: creates it, and waits for its supervisor; says why when that does not come up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from docker import APIClient

from helmr.errors import HelmrError, ImageError, Unavailable
from worker import machine_record
from worker.channel import Channel
from worker.container_spec import HostSide, container
from worker.containers import Containers, how, short
from worker.docker_api import DockerApi
from worker.engine import ImageGone, MachineSpec
from worker.host import writing
from worker.images import Images
from worker.machine_folder import MachineFolder, library, workspace_files
from worker.machine_record import MachineRecord

#: Seconds from the start of a container until its supervisor must have answered; 0.05 on a quiet machine.
READY_TIMEOUT = 30.0
#: Seconds between looks at a booting container: has it died instead of answering?
_LOOK = 0.15
#: Exit codes of a supervisor that was killed, or told to end, from outside: no fault of its image.
_ENDED_FROM_OUTSIDE = {137, 143}


class ContainerBoot:
    """Boots containers of one home; ``cpus`` tells how many processors the engine has."""

    def __init__(
        self,
        api: DockerApi,
        home: Path,
        install: str,
        *,
        images: Images,
        containers: Containers,
        cpus: Callable[[], Awaitable[int]],
    ) -> None:
        self._api = api
        self._home = home
        self._install = install
        self._images = images
        self._containers = containers
        self._cpus = cpus
        self._library: Path | None = None

    async def start(self, spec: MachineSpec, name: str, folder: MachineFolder) -> str:
        """Create and start a container with the name; returns its ref.

        Raises:
            ImageGone, ImageError: the image is not there any more, or has no Python.
            EngineUnavailable, HelmrError: the engine is gone, or refuses.
        """
        cpus = await self._cpus()
        with writing(self._home):
            if self._library is None:
                self._library = await asyncio.to_thread(library, self._home)
            folder.create()
            machine_record.write(folder.path, MachineRecord.of(spec))
            files = workspace_files(self._home, spec.workspace_id) if spec.workspace_id else folder.files
            files.mkdir(parents=True, exist_ok=True)
        host = HostSide(
            install=self._install,
            name=name,
            library=self._library,
            run=folder.run,
            sources=folder.sources,
            files=files,
            cpus=cpus,
        )

        def create_and_start(client: APIClient) -> str:
            ref: str = client.create_container(**container(client, spec, host))["Id"]
            client.start(ref)
            return ref

        try:
            return short(await self._api.call(create_and_start))
        except HelmrError as error:
            self._images.forget()
            raise _start_error(spec.image, error) from error

    async def greet(self, spec: MachineSpec, ref: str, folder: MachineFolder) -> Channel:
        """Connect to the supervisor as soon as it listens, unless the container ends first.

        Raises:
            ImageError: its Python cannot run the supervisor.
            Unavailable: it was ended from outside, or does not answer.
        """
        connecting = asyncio.ensure_future(
            Channel.connect(folder.socket(), client=spec.worker_id, ready_within=READY_TIMEOUT)
        )
        try:
            while not (await asyncio.wait([connecting], timeout=_LOOK))[0]:
                if (state := await self._containers.ended(ref)) is not None:
                    raise await self._stillborn(spec.image, ref, state)
            return connecting.result()
        finally:
            connecting.cancel()

    async def _stillborn(self, image: str, ref: str, state: dict[str, Any]) -> HelmrError:
        if state["ExitCode"] in _ENDED_FROM_OUTSIDE and not state["OOMKilled"]:
            return Unavailable(f"{how(state)} while it was starting")
        said = await self._api.call(lambda client: client.logs(ref, tail=30))
        text = said.decode(errors="replace").strip()
        return ImageError(
            f"no machine can be made of the image {image}: {how(state)}{': ' + text.splitlines()[-1] if text else ''}",
            hint="the image needs a working python3, 3.10 or newer",
            details={"log": text},
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
