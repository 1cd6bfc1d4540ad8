"""Parts of Helmr as child processes, which tests may kill, stop and continue."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from bus.server import EmbeddedServer
from tests.integration import worker_process


class Part:
    """A child process that has said it is ready; ``name`` is what it said."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self.process = process
        self.name = name
        self.log = log

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        await self.process.wait()

    async def end(self) -> int:
        """Stop it in good order; its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        async with asyncio.timeout(60):
            return await self.process.wait()


@asynccontextmanager
async def part(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> AsyncIterator[Part]:
    """``python -m tests.integration.worker_process WORDS``, killed at the end if it still lives."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{words[0]}-{len(list(folder.iterdir()))}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", worker_process.__name__, *words),
            cwd=Path(__file__).parents[2],
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=dict(os.environ) | dict(environment or {}),
        )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(120):
            name = (await process.stdout.readline()).decode().strip()
        assert name, log.read_text()
        yield Part(process, name, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def worker(
    url: str, home: Path, *, engine: str = "process", environment: Mapping[str, str] | None = None
) -> AsyncIterator[Part]:
    """A worker over ``home``."""
    async with part(home / "parts", "worker", url, str(home), engine, environment=environment) as running:
        yield running


#: Deadlines so long that no part is ever taken for dead, however slow the machine is; and a key for secrets.
PATIENT = {"HELMR_TEST_PACE": "30", "HELMR_SECRET_KEY": base64.b64encode(bytes(32)).decode()}


@asynccontextmanager
async def patient(home: Path) -> AsyncIterator[str]:
    """A server and a control process over an empty store in ``home``, for workers that are given :data:`PATIENT` as well."""
    server = EmbeddedServer(home, durability="relaxed")
    await server.start()
    try:
        async with part(home / "parts", "control", server.url, environment=PATIENT) as control:
            yield server.url
            assert await control.end() == 0
    finally:
        await server.stop()
