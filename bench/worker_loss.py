"""How long it takes from kill -9 of a worker until the run that it executed is executed again.

    .venv/bin/python -m bench.worker_loss --kills 50

Two workers of one home stand by; the one that holds the run is killed at a random moment between its heartbeats. Measured from
the signal to the run's next ``started`` event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from bench.installation import part, server
from bus import topology
from helmr.client import AsyncClient, RunHandle


class Workers:
    """The workers that stand by, by id."""

    def __init__(self, environment: dict[str, str], stack: AsyncExitStack) -> None:
        self._environment = environment
        self._stack = stack
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def add(self) -> None:
        """One more, ready to take runs."""
        words = ("worker", "--engine", "process", "--slots", "2", "--drain", "0", "--json")
        process = await self._stack.enter_async_context(part(self._environment, *words))
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        self._processes[ready["id"]] = process

    async def kill(self, worker_id: str) -> datetime:
        """kill -9; when it was."""
        process = self._processes.pop(worker_id)
        at = datetime.now(UTC)
        process.kill()
        await process.wait()
        return at


async def nth(run: RunHandle, kind: str, count: int) -> tuple[datetime, dict[str, object]]:
    """When the run's ``count``-th event of this kind was, and what it said."""
    async for event in run.events():
        count -= event.kind == kind
        if count == 0:
            return event.at, event.data
    raise SystemExit(f"run {run.id} ended without another {kind}")


async def one(client: AsyncClient, workers: Workers) -> float:
    """Seconds from one kill to the next start."""
    run = (await client.sessions.start("sleep")).run
    _, lease = await nth(run, "leased", 1)
    await nth(run, "started", 1)
    await asyncio.sleep(random.uniform(0, topology.HEARTBEAT))  # noqa: S311
    killed = await workers.kill(str(lease["worker"]))
    again, _ = await nth(run, "started", 2)
    await run.cancel()
    await run.wait()
    await workers.add()
    return (again - killed).total_seconds()


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    began = time.monotonic()
    async with server() as (environment, client, _), AsyncExitStack() as stack:
        workers = Workers(environment, stack)
        for _ in range(2):
            await workers.add()
        taken = sorted([await one(client, workers) for _ in range(options.kills)])
    print(f"{options.kills} kills in {time.monotonic() - began:.0f} s")
    print(f"executed again after: p50 {statistics.median(taken):.1f} s, min {taken[0]:.1f} s, max {taken[-1]:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
