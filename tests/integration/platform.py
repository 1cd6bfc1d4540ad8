"""Helmr in one process, for tests: an embedded server, control, workers with the process engine, and clients."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from nats.aio.client import Client as Nats

from bus.control import Control
from bus.janitor import RETENTION
from bus.keyring import KeyRing
from bus.log import RUN
from bus.server import EmbeddedServer
from helmr.client import AsyncClient, RunHandle
from helmr.connection import connect
from helmr.models import Event, Run
from helmr.subjects import Scope
from worker.process_engine import ProcessEngine
from worker.worker import Worker


class RunningWorker:
    """A worker of this process, with an engine of its own."""

    def __init__(self, worker: Worker, nc: Nats) -> None:
        self.worker = worker
        self.nc = nc
        self.id = worker.id
        self.hurry = asyncio.Event()
        self._stop = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def start(self, *, drain: float = 0.0) -> None:
        """Return once it takes runs; raises what keeps it from doing so."""
        ready = asyncio.Event()
        self._life = asyncio.create_task(self.worker.run(self._stop, ready, drain=drain, hurry=self.hurry))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._life, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._life.done():
            await self._life

    async def stop(self) -> None:
        """Stop it in good order."""
        self._stop.set()
        if self._life is not None:
            await self._life
        await self.nc.close()


class Platform:
    """A running Helmr; made by :func:`running`."""

    def __init__(self, home: Path, server: EmbeddedServer, nc: Nats, control: Control) -> None:
        self.home = home
        self.server = server
        self.nc = nc
        self.control = control
        self.workers: list[RunningWorker] = []
        self._stack = AsyncExitStack()

    async def add_worker(
        self,
        *,
        slots: int = 4,
        home: Path | None = None,
        drain: float = 0.0,
        url: str | None = None,
        end_when_cut_off: bool = False,
    ) -> RunningWorker:
        """One more worker; those with the same home share its workspaces."""
        home = home or self.home
        nc = await connect(url or self.server.url, name="worker")
        engine = ProcessEngine(home / "engine")
        worker = Worker(nc, engine, await engine.check(), home=home, slots=slots, end_when_cut_off=end_when_cut_off)
        running = RunningWorker(worker, nc)
        await running.start(drain=drain)
        self.workers.append(running)
        return running

    async def stop_worker(self, worker: RunningWorker) -> None:
        """Stop a worker in good order."""
        self.workers.remove(worker)
        await worker.stop()

    async def client(self, project: str = "acme") -> AsyncClient:
        """A connected client, closed with the platform."""
        client = AsyncClient(self.server.url, project=project, env="test", home=self.home)
        return await self._stack.enter_async_context(client)

    async def project(self, name: str, tasks: str) -> AsyncClient:
        """A client of a project in which ``tasks`` (the source of its one module) are deployed."""
        client = await self.client(name)
        await client.deployments.deploy(write_project(self.home / "projects" / name, name, tasks))
        return client

    async def close(self) -> None:
        """Stop the clients and the workers."""
        await self._stack.aclose()
        for worker in list(self.workers):
            await self.stop_worker(worker)


def write_project(folder: Path, name: str, tasks: str) -> Path:
    """A task project in ``folder``; replaces what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "helmr.toml").write_text(f'project = "{name}"\nenv = "test"\n')
    (folder / "tasks.py").write_text(textwrap.dedent(tasks))
    return folder


@asynccontextmanager
async def control_of(
    server: EmbeddedServer, ring: KeyRing | None = None, *, retention: float = RETENTION
) -> AsyncIterator[Control]:
    """A control process, on a connection of its own."""
    nc = await connect(server.url, name="control")
    control = Control(nc, ring or KeyRing.find(server.home.parent), retention=retention)
    started = asyncio.Event()

    async def live() -> None:
        async with asyncio.TaskGroup() as tasks:
            await control.start(tasks)
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(live())
    waiting = asyncio.create_task(started.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield control
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.wait({task})
        control.close()
        await nc.close()
        if not task.cancelled():
            task.result()


@asynccontextmanager
async def running(
    home: Path, *, workers: int = 1, slots: int = 4, retention: float = RETENTION
) -> AsyncIterator[Platform]:
    """Helmr over an empty store in ``home``, on a server that is started again when it dies."""
    server = EmbeddedServer(home, durability="relaxed")
    await server.start()
    keeping = asyncio.create_task(server.supervise())
    try:
        async with control_of(server, retention=retention) as control:
            platform = Platform(home, server, control.nc, control)
            try:
                for _ in range(workers):
                    await platform.add_worker(slots=slots)
                yield platform
            finally:
                await platform.close()
    finally:
        await server.stop()
        await keeping


async def history(client: AsyncClient, run: Run | RunHandle | str) -> list[Event]:
    """All events of a run so far; fails when their cursors have a gap or an end is not the end."""
    events = await client.runs.events.list(run, limit=1000)
    assert [event.cursor for event in events] == list(range(1, len(events) + 1))
    ends = [event.cursor for event in events if event.kind in {"succeeded", "failed", "cancelled", "expired"}]
    assert ends in ([], [len(events)])
    return events


async def kinds(client: AsyncClient, run: Run | RunHandle | str) -> list[str]:
    """The kinds of a run's events so far."""
    return [event.kind for event in await history(client, run)]


async def until(client: AsyncClient, run: Run | RunHandle | str, kind: str, *, count: int = 1) -> Event:
    """The ``count``-th event of this kind, as soon as it is there."""
    async with asyncio.timeout(30):
        async for event in client.runs.events.subscribe(run):
            count -= event.kind == kind
            if count == 0:
                return event
    raise AssertionError(f"the run ended without {kind}")


async def written(client: AsyncClient, run: Run | RunHandle | str, *, follow: bool = False) -> dict[str, bytes]:
    """What a run wrote, by stream; fails when a stored stream has a gap."""
    found: dict[str, bytes] = {"stdout": b"", "stderr": b"", "log": b""}
    async for chunk in client.runs.logs(run, follow=follow):
        found[chunk.stream] += chunk.data
    return found


async def state_of(platform: Platform, client: AsyncClient, run: Run | RunHandle | str) -> Any:
    """The run's state as the log has it."""
    run_id = run if isinstance(run, str) else run.id
    return (await platform.control.log.present(RUN, Scope(*client.scope), run_id)).state
