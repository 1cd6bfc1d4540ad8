"""How long it takes from kill -9 of a worker until its runs are executed again, or go on.

    .venv/bin/python -m bench.worker_loss --kills 50
    .venv/bin/python -m bench.worker_loss --restart 20 --engine docker

Two workers of one home stand by; the one that holds the run is killed at a random moment between its heartbeats. Measured from
the signal to the run's next ``started`` event.

With ``--restart``, one worker executes so many runs, is killed, and another one is started at once. Measured from its start to
the lease under which each run goes on; then every byte that they print is compared, and their code must have begun once.
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

    async def add(self, engine: str = "process", slots: int = 2) -> str:
        """One more, ready to take runs; its id."""
        words = ("worker", "--engine", engine, "--slots", str(slots), "--drain", "0", "--json")
        process = await self._stack.enter_async_context(part(self._environment, *words))
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        worker_id: str = ready["id"]
        self._processes[worker_id] = process
        return worker_id

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


async def going_on(client: AsyncClient, workers: Workers, engine: str, count: int) -> None:
    """Kill the worker of ``count`` runs, start another one, and say when they went on and whether all is there."""
    first = await workers.add(engine, count)
    lines, pause = 600, 1.0  # a minute: so long the slowest container of twenty may take to start
    runs = [(await client.sessions.start("prints", {"lines": lines, "pause": pause})).run for _ in range(count)]
    await asyncio.gather(*(nth(run, "started", 1) for run in runs))
    await workers.kill(first)
    killed = datetime.now(UTC)
    await workers.add(engine, count)
    ready = datetime.now(UTC)
    leases = [(await nth(run, "leased", 2))[0] for run in runs]
    since = sorted((at - killed).total_seconds() for at in leases)
    print(f"{count} runs went on {since[0]:.2f} to {since[-1]:.2f} s after the start of the worker, ", end="")
    print(f"which said that it is ready after {(ready - killed).total_seconds():.2f} s")
    wanted = b"".join(b"%08d %s\n" % (number, b"x" * 70) for number in range(lines))
    whole = 0
    for run in runs:
        done = await run.wait()
        said = b"".join([chunk.data async for chunk in run.logs(stream="stdout")])
        whole += (done.output, done.attempt, done.dispatch_attempt, said) == (1, 1, 2, wanted)
    print(f"{whole} of {count} succeeded in dispatch 2, begun once, with every byte as it was printed")


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restart", type=int, metavar="RUNS", help="start the worker again, and have its runs go on")
    parser.add_argument("--engine", choices=["process", "docker"], default="process", help="for --restart")
    options = parser.parse_args()
    if options.restart:
        async with server() as (environment, client, _), AsyncExitStack() as stack:
            await going_on(client, Workers(environment, stack), options.engine, options.restart)
        return
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
