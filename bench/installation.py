"""A Helmr of its own for a benchmark: server and worker as real processes over a temporary home, fsync on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from bench.cpu import Account
from helmr.client import AsyncClient

PROJECT = Path(__file__).parent / "project"


class Installation(NamedTuple):
    """A client of what runs, the two processes that make it run, and the environment for commands to it."""

    client: AsyncClient
    server: int
    worker: int
    environment: dict[str, str]

    def account(self) -> Account:
        """The processor time of its parts."""
        return Account(self.server, self.worker)

    @contextlib.contextmanager
    def paused_projector(self) -> Iterator[None]:
        """Have the projector do nothing for the length of a block."""
        pid = self.account().projector
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


class Server(NamedTuple):
    """An installation without workers: the environment for them, a client, and the server's process."""

    environment: dict[str, str]
    client: AsyncClient
    pid: int


@asynccontextmanager
async def installation(engine: str, slots: int) -> AsyncIterator[Installation]:
    """A running installation with the benchmark's project deployed."""
    words = ("worker", "--engine", engine, "--slots", str(slots), "--drain", "0")
    async with server() as (environment, client, pid), part(environment, *words) as worker:
        await ready(environment)
        yield Installation(client, pid, worker.pid, environment)


@asynccontextmanager
async def server() -> AsyncIterator[Server]:
    """An installation without workers, with the benchmark's project deployed."""
    with tempfile.TemporaryDirectory(prefix="helmr-bench-") as home:
        environment = os.environ | {"HELMR_HOME": home, "HELMR_PROJECT": "bench"}
        for name in ("HELMR_URL", "HELMR_API_KEY", "HELMR_ENV"):
            environment.pop(name, None)
        async with part(environment, "server") as process:
            await ready(environment, "--part", "control", "--part", "projector")
            async with AsyncClient(project="bench", home=home) as client:
                await client.deployments.deploy(PROJECT)
                yield Server(environment, client, process.pid)


@asynccontextmanager
async def part(environment: dict[str, str], *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One part of the installation, for the length of a block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *arguments), env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 30)


async def ready(environment: dict[str, str], *options: str) -> None:
    """Return when every part is up."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cli.main",
        "status",
        "--wait",
        "60s",
        "--json",
        *options,
        env=environment,
        stdout=asyncio.subprocess.DEVNULL,
    )
    if await process.wait() != 0:
        raise SystemExit("the installation did not come up")
