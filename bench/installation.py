"""A Helmr of its own for a benchmark: server and worker as real processes over a temporary home, fsync on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from helmr.client import AsyncClient

PROJECT = Path(__file__).parent / "project"


@asynccontextmanager
async def installation(engine: str, slots: int) -> AsyncIterator[AsyncClient]:
    """A client of a running installation with the benchmark's project deployed."""
    words = ("worker", "--engine", engine, "--slots", str(slots), "--drain", "0")
    async with server() as (environment, client), part(environment, *words):
        await ready(environment)
        yield client


@asynccontextmanager
async def server() -> AsyncIterator[tuple[dict[str, str], AsyncClient]]:
    """An installation without workers: the environment for them, and a client, with the benchmark's project deployed."""
    with tempfile.TemporaryDirectory(prefix="helmr-bench-") as home:
        environment = os.environ | {"HELMR_HOME": home, "HELMR_PROJECT": "bench"}
        for name in ("HELMR_URL", "HELMR_API_KEY", "HELMR_ENV"):
            environment.pop(name, None)
        async with part(environment, "server"):
            await ready(environment, "--part", "control", "--part", "projector")
            async with AsyncClient(project="bench", home=home) as client:
                await client.deployments.deploy(PROJECT)
                yield environment, client


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
