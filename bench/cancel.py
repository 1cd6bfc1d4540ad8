"""How long it takes from a cancel until nothing of the run is alive.

    .venv/bin/python -m bench.cancel --engine process --tries 50

Measured from the client's call to the run's ``cancelled`` event as a live subscriber hears it. On the process engine the
processes that the task has named are looked for in that moment: there must be none.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from bench.installation import installation
from helmr.client import AsyncClient, RunHandle

#: Tasks of the benchmark's project: the grace that each gives (what obeys SIGTERM needs none), and how many processes it names.
TASKS = {"sleep": (0.0, 1), "deaf": (1.0, 1), "daemon": (1.0, 2), "session": (1.0, 2)}


async def named(run: RunHandle, count: int) -> list[int]:
    """The ids of the run's processes, as soon as all of them have told theirs."""
    told = b""
    async for chunk in run.logs(follow=True, stream="stdout"):
        told += chunk.data
        if told.count(b"\n") == count:
            return [int(word) for word in told.split()]
    raise SystemExit(f"run {run.id} ended early")


def alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def one(client: AsyncClient, task: str, *, look: bool) -> float:
    """Seconds from one cancel to the end of its run."""
    run = (await client.sessions.start(task)).run
    pids = await named(run, TASKS[task][1])
    if look and not all(alive(pid) for pid in pids):
        raise SystemExit(f"the processes of run {run.id} are not to be seen")
    began = time.perf_counter()
    await run.cancel()
    async for event in run.events():
        if event.kind == "cancelled":
            break
    taken = time.perf_counter() - began
    if look and any(alive(pid) for pid in pids):
        raise SystemExit(f"run {run.id} of {task} is cancelled, and some of {pids} are alive")
    return taken


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("docker", "process"), default="process")
    parser.add_argument("--tries", type=int, default=50)
    options = parser.parse_args()
    async with installation(options.engine, slots=4) as helmr:
        for task, (grace, _) in TASKS.items():
            look = options.engine == "process"
            taken = sorted([await one(helmr.client, task, look=look) for _ in range(options.tries)])
            p99 = taken[min(int(len(taken) * 0.99), len(taken) - 1)]
            row = f"p50 {statistics.median(taken) * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, max {taken[-1] * 1e3:.0f} ms"
            print(f"{task:8} (grace {grace:g} s): {row}; {len(taken)} tries", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
