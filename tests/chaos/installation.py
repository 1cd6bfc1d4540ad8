"""The installation under test: real processes, started as users start them, each with a proxy between it and NATS.

One nats-server, one ``helmr server`` on top of it (control, and the projector as its child), one more control process, and
three workers on two "hosts" (home folders). Whatever ends is started again, as an init system would.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bus.server import EmbeddedServer
from cli.process import Part
from helmr.errors import HelmrError, Unavailable
from tests import leaks
from tests.chaos import part_process
from tests.chaos.machines import machines
from tests.chaos.proxy import Proxy, proxied

log = logging.getLogger(__name__)

#: Seconds a part gets to come up, and to end in good order.
_READY, _GRACE = 60.0, 40.0
#: How the end of a part is told that found no NATS: with the exit code that says so, and whoever started it tries again.
_GAVE_UP = f"{{}} ended (exit code {Unavailable.exit_code})"
#: Heartbeats and deadlines come that much quicker than users have them: see ``bus.topology``.
PACE = "0.4"
_ROOT = Path(__file__).parents[2]


class Member:
    """One part, its proxy, and everything it said."""

    def __init__(self, name: str, words: Sequence[str], proxy: Proxy, home: Path, log: Path) -> None:
        self.name = name
        self.proxy = proxy
        self.home = home
        self.log = log
        #: The ids it had, if it is a worker: one for each of its lives.
        self.ids: list[str] = []
        #: Ends that were not asked for by a signal of ours.
        self.crashes: list[str] = []
        #: Starts that came to nothing because NATS was not there.
        self.gave_up = 0
        self._killed = 0
        self._was_ready = False
        self.part = Part(
            name,
            lambda: [sys.executable, "-m", part_process.__name__, *words],
            self._listen,
            orphaned=signal.SIGKILL,
            died=self._died,
            env=_environment(home, proxy.url),
        )

    @property
    def pids(self) -> list[int]:
        """The process id of the part, while it lives."""
        return [] if self.part.pid is None else [self.part.pid]

    def kill(self) -> None:
        """SIGKILL."""
        self._killed += 1
        self.part.signal(signal.SIGKILL)

    def _listen(self, line: str) -> bool:
        with self.log.open("a") as log:
            log.write(line + "\n")
        if line.startswith('{"ready"'):
            said = json.loads(line)
            self.ids += [said["id"]] if said["part"] == "worker" else []
        elif line != "control":
            return False
        self._was_ready = True
        return True

    def _died(self, words: str) -> None:
        self._was_ready, was_ready = False, self._was_ready
        if self._killed and "SIGKILL" in words:
            self._killed -= 1
        elif words.startswith(_GAVE_UP.format(self.name)) and not was_ready:
            self.gave_up += 1
        else:
            self.crashes.append(words)


class Installation:
    """Everything that runs; made by :func:`installation`."""

    def __init__(self, folder: Path, nats: EmbeddedServer, client: Proxy, engine: str) -> None:
        self.folder = folder
        self.nats = nats
        self.homes = [folder / "host-a", folder / "host-b"]
        self.machines = machines(engine, self.homes)
        #: What clients connect to.
        self.client = client
        self.members: dict[str, Member] = {}
        self._lives: list[asyncio.Task[None]] = []

    @property
    def workers(self) -> list[Member]:
        """The workers."""
        return [member for name, member in self.members.items() if name.startswith("worker")]

    @property
    def history(self) -> Path:
        """Where the projector keeps its files."""
        return self.members["server"].home / "history"

    def projector(self) -> list[int]:
        """The process id of the projector, while it lives."""
        return [
            pid
            for pid, command in leaks.descendants().items()
            if "store.main" in command and str(self.folder) in command
        ]

    def pids(self, target: str) -> list[int]:
        """The processes that a fault's target means."""
        if target == "nats":
            return [self.nats.pid] if self.nats.pid else []
        return self.projector() if target == "projector" else self.members[target].pids

    async def kill(self, target: str) -> None:
        """SIGKILL what the name means; whoever looks after it starts it again. ``machine`` is any one of a workspace."""
        if target == "machine":
            await self._kill_machine()
        elif target in self.members:
            self.members[target].kill()
        else:
            self.send(target, signal.SIGKILL)

    async def _kill_machine(self) -> None:
        living = await self.machines.living()
        if living:
            try:
                await self.machines.kill(random.choice(living))
            except (ProcessLookupError, HelmrError) as error:
                log.info("it has ended by itself: %s", error)

    def send(self, target: str, number: signal.Signals) -> None:
        """Send a signal to what the name means, if it lives."""
        for pid in self.pids(target):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # gone by itself

    def proxy(self, target: str) -> Proxy:
        """The proxy of a part, or of the clients."""
        return self.client if target == "client" else self.members[target].proxy

    def heal(self) -> None:
        """Undo every fault that lasts."""
        for target in ("nats", "projector", *self.members):
            self.send(target, signal.SIGCONT)
        for target in ("client", *self.members):
            self.proxy(target).heal()

    async def launch(self, member: Member) -> None:
        """Start a part and wait until it is ready."""
        self.members[member.name] = member
        self._lives.append(asyncio.create_task(member.part.run()))
        async with asyncio.timeout(_READY):
            await member.part.ready.wait()

    async def ready(self) -> None:
        """Wait until every part is up."""
        async with asyncio.timeout(_READY):
            for member in self.members.values():
                await member.part.ready.wait()

    async def stop_workers(self) -> None:
        """Stop the workers in good order."""
        await asyncio.gather(*(member.part.stop(_GRACE) for member in self.workers))

    async def close(self) -> None:
        """Stop everything."""
        self.heal()
        await self.stop_workers()
        for name in ("control", "server"):
            if name in self.members:
                await self.members[name].part.stop(_GRACE)
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        await self.machines.close()


def _environment(home: Path, url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HELMR_")}
    mutation = os.environ.get(part_process.MUTATION)
    own = {"HELMR_URL": url, "HELMR_HOME": str(home), "HELMR_TEST_PACE": PACE, "PYTHONPATH": str(_ROOT)}
    return kept | own | ({part_process.MUTATION: mutation} if mutation else {})


@asynccontextmanager
async def installation(folder: Path, *, engine: str = "process", slots: int = 4) -> AsyncIterator[Installation]:
    """A running installation below ``folder``, for the length of a block."""
    nats = EmbeddedServer(folder / "nats", durability="relaxed")
    await nats.start()
    keeping = asyncio.create_task(nats.supervise())
    try:
        async with AsyncExitStack() as stack:
            port = nats.port or 0
            running = Installation(folder, nats, await stack.enter_async_context(proxied(port)), engine)
            stack.push_async_callback(running.close)
            (folder / "logs").mkdir()

            async def member(name: str, host: str, words: Callable[[str], Sequence[str]]) -> None:
                proxy = await stack.enter_async_context(proxied(port))
                log = folder / "logs" / f"{name}.log"
                await running.launch(Member(name, words(proxy.url), proxy, folder / host, log))

            await member("server", "server", lambda _: ["server", "--json", "--verbose"])
            await member("control", "control", lambda url: ["control", url])
            work = ["worker", "--engine", engine, "--slots", str(slots), "--json", "--verbose"]
            for name, host in (("worker-1", "host-a"), ("worker-2", "host-a"), ("worker-3", "host-b")):
                await member(name, host, lambda _: work)
            yield running
            await running.close()
    finally:
        await nats.stop()
        await keeping
