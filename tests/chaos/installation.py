"""The installation under test: real processes, started as users start them, each with a proxy between it and NATS.

One nats-server, one ``helmr server`` on top of it (control, and the projector as its child), one more control process, and
three workers on two "hosts" (home folders). Whatever ends is started again, as an init system would.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bus.server import EmbeddedServer
from cli.process import Part
from helmr.errors import Unavailable
from tests import leaks
from tests.chaos import part_process
from tests.chaos.machines import Containers, Machines, Missed, Processes
from tests.chaos.own_engine import OwnEngine, own_engine
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

    def __init__(
        self, name: str, words: Sequence[str], *, proxy: Proxy, home: Path, log: Path, env: dict[str, str]
    ) -> None:
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
            env=_environment(home, proxy.url) | env,
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

    def __init__(
        self, folder: Path, nats: EmbeddedServer, client: Proxy, engine: tuple[OwnEngine, Proxy] | None
    ) -> None:
        self.folder = folder
        self.nats = nats
        self.homes = [folder / "host-a", folder / "host-b"]
        self.engine = engine[0] if engine is not None else None
        self._engine_proxy = engine[1] if engine is not None else None
        self.containers = Containers(self.engine.url) if self.engine is not None else None
        self.machines: Machines = self.containers or Processes(self.homes)
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
        match target:
            case "nats":
                return [self.nats.pid] if self.nats.pid else []
            case "projector":
                return self.projector()
            case "engine" | "containerd":
                return self.engine.pids(target) if self.engine is not None else []
            case _:
                return self.members[target].pids

    async def kill(self, target: str) -> None:
        """SIGKILL what the name means; whoever looks after it starts it again.

        ``machine`` is any one of a workspace; ``init`` its first process, killed past the engine.
        """
        if target in {"machine", "init"}:
            await self._break_machine(self._kill_init if target == "init" else self.machines.kill)
        elif target in self.members:
            self.members[target].kill()
        else:
            self.send(target, signal.SIGKILL)

    async def _kill_init(self, machine: str) -> None:
        if self.containers is not None:
            await self.containers.kill_init(machine)

    async def pause(self, target: str, seconds: float) -> None:
        """Stop what the name means for so long."""
        if target == "machine":
            await self._break_machine(functools.partial(self._pause_machine, seconds))
            return
        self.send(target, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.send(target, signal.SIGCONT)

    async def _pause_machine(self, seconds: float, machine: str) -> None:
        if self.containers is not None:
            await self.containers.pause(machine)
            await asyncio.sleep(seconds)
            await self.containers.unpause(machine)

    async def _break_machine(self, how: Callable[[str], Awaitable[None]]) -> None:
        try:
            living = await self.machines.living()
            if living:
                await how(random.choice(living))
        except Missed as error:
            log.info("it has ended by itself, or cannot be asked for: %s", error)

    def send(self, target: str, number: signal.Signals) -> None:
        """Send a signal to what the name means, if it lives."""
        for pid in self.pids(target):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # gone by itself

    def proxy(self, target: str) -> Proxy:
        """The proxy of a part, of the clients, or before the engine."""
        if target == "engine" and self._engine_proxy is not None:
            return self._engine_proxy
        return self.client if target == "client" else self.members[target].proxy

    def heal(self) -> None:
        """Undo every fault that lasts."""
        engine = () if self.engine is None else ("engine",)
        for target in ("nats", "projector", *engine, *self.members):
            self.send(target, signal.SIGCONT)
        for target in ("client", *engine, *self.members):
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
            if self.engine is not None:
                await self.engine.ready()
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


def _environment(home: Path, url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HELMR_")}
    mutation = os.environ.get(part_process.MUTATION)
    scratch = home / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)  # what a killed part has left goes with the rest
    own = {
        "TMPDIR": str(scratch),
        "HELMR_URL": url,
        "HELMR_HOME": str(home),
        "HELMR_TEST_PACE": PACE,
        "PYTHONPATH": str(_ROOT),
    }
    return kept | own | ({part_process.MUTATION: mutation} if mutation else {})


@asynccontextmanager
async def installation(
    folder: Path, *, engine: str = "process", slots: int = 4, live_restore: bool = False
) -> AsyncIterator[Installation]:
    """A running installation below ``folder``, for the length of a block; with an engine of its own, if it is ``docker``."""
    nats = EmbeddedServer(folder / "nats", durability="relaxed")
    await nats.start()
    keeping = asyncio.create_task(nats.supervise())
    try:
        async with AsyncExitStack() as stack:
            port = nats.port or 0
            (folder / "logs").mkdir()
            own, env = None, {}
            if engine == "docker":
                logged = folder / "logs" / "engine.log"
                own = await stack.enter_async_context(own_engine(folder / "engine", logged, live_restore=live_restore))
                env = {"DOCKER_HOST": own[0].proxied}
            running = Installation(folder, nats, await stack.enter_async_context(proxied(port)), own)
            stack.push_async_callback(running.close)

            async def member(name: str, host: str, words: Callable[[str], Sequence[str]]) -> None:
                proxy = await stack.enter_async_context(proxied(port))
                log = folder / "logs" / f"{name}.log"
                await running.launch(Member(name, words(proxy.url), proxy=proxy, home=folder / host, log=log, env=env))

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
