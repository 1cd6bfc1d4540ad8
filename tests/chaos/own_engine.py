"""A Docker engine of the test-bed's own, to be killed and stopped while that of the machine goes on in peace.

It has its own folders and its own containerd, a service beside it, as distributions have it. It has its own network, too, with
nothing in it (containers of Helmr need none): an engine that is told to have no bridge removes ``docker0``, whosever it is.
What speaks to it does so through a proxy, which can hold back and cut that as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from docker import APIClient

from cli.process import Part
from tests import leaks
from tests.chaos.proxy import Proxy, proxied
from worker import base_image
from worker.docker_api import OLDEST_API, DockerApi, connection

#: Seconds it gets to come up (it first ends the containers of its last life), and to end.
_READY, _GRACE = 60.0, 40.0
_VERSION = ".".join(map(str, OLDEST_API))


_CONTAINERD = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{address}"
"""


class OwnEngine:
    """A dockerd and a containerd that are started again whenever they end; made by :func:`own_engine`."""

    def __init__(self, folder: Path, run: Path, log: Path, *, live_restore: bool) -> None:
        self.socket = run / "docker.sock"
        self.door = run / "proxy.sock"
        self._folders = (folder, run)
        self._log = log
        address, config, settings = run / "containerd.sock", folder / "containerd.toml", folder / "daemon.json"
        config.write_text(_CONTAINERD.format(root=folder / "containerd", state=run / "containerd", address=address))
        settings.write_text("{}")  # not the machine's
        words = [
            *(
                "unshare",
                "--net",
                "dockerd",
                "--config-file",
                settings,
                "--data-root",
                folder / "data",
                "--exec-root",
                run / "exec",
            ),
            *("--pidfile", run / "pid", "--host", f"unix://{self.socket}", "--containerd", address),
            *("--bridge", "none", "--iptables=false", "--ip-masq=false", "--ip-forward=false"),
            *(["--live-restore"] if live_restore else []),
        ]
        self.parts = {
            "containerd": self._part("containerd", ["containerd", "--config", config], "successfully booted"),
            "engine": self._part("engine", words, "API listen on"),
        }

    def _part(self, name: str, words: Sequence[object], booted: str) -> Part:
        def note(line: str) -> None:
            with self._log.open("a") as log:
                log.write(f"{name}: {line}\n")

        def hear(line: str) -> bool:
            note(line)
            return booted in line

        return Part(name, lambda: [str(word) for word in words], hear, died=note)

    @property
    def url(self) -> str:
        """Where it listens, without a proxy."""
        return f"unix://{self.socket}"

    @property
    def proxied(self) -> str:
        """Where its proxy listens."""
        return f"unix://{self.door}"

    def pids(self, target: str) -> list[int]:
        """The process of one of its parts, while it lives."""
        pid = self.parts[target].pid
        return [] if pid is None else [pid]

    async def ready(self) -> None:
        """Wait until both parts are up."""
        for part in self.parts.values():
            await part.ready.wait()

    async def fill(self) -> None:
        """Give it the image that tasks run in by default, from the machine's engine."""
        machine = DockerApi()
        try:
            image = await base_image.ensure(machine, print)
        finally:
            await machine.close()
        await asyncio.to_thread(self._load, image)

    def _load(self, image: str) -> None:
        with (
            contextlib.closing(APIClient(**connection(), version=_VERSION)) as source,
            contextlib.closing(APIClient(base_url=self.url, version=_VERSION)) as target,
        ):
            for _ in target.load_image(source.get_image(image)):
                pass  # what it says on the way

    def is_own(self, command: str) -> bool:
        """Whether a process is the engine's: what watches over a container, or a container that never came to be.

        Such are left when containerd is killed at the wrong time. What runs in a container is not the engine's.
        """
        shim = "containerd-shim" in command and str(self.socket.parent) in command
        return shim or command == "runc init"

    def clean_up(self) -> None:
        """Undo what it has mounted, and end what it has left; it has ended."""
        for pid, command in leaks.descendants().items():
            if self.is_own(command):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in reversed(mounts):
            if path.startswith(tuple(f"{folder}/" for folder in self._folders)):
                subprocess.run(["umount", "--lazy", path], check=True)


@asynccontextmanager
async def own_engine(folder: Path, log: Path, *, live_restore: bool) -> AsyncIterator[tuple[OwnEngine, Proxy]]:
    """An engine in ``folder`` and the proxy before it, for the length of a block."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise RuntimeError("an engine of our own takes root, and dockerd")
    folder.mkdir()
    run = Path(tempfile.mkdtemp(prefix="helmr-", dir="/tmp"))  # not below ours: paths of sockets must be short
    engine = OwnEngine(folder, run, log, live_restore=live_restore)
    living = [asyncio.create_task(part.run()) for part in engine.parts.values()]
    try:
        async with asyncio.timeout(_READY):
            await engine.ready()
        await engine.fill()
        async with proxied(engine.socket, at=engine.door) as proxy:
            yield engine, proxy
    finally:
        for part in reversed(engine.parts.values()):
            await part.stop(_GRACE)
        await asyncio.gather(*living)
        engine.clean_up()
        await asyncio.to_thread(shutil.rmtree, run)
