"""How long it takes from a record's being sent until the task that waits for it goes on.

    .venv/bin/python -m bench.waits --times 200 --parked 50 [--engine docker]

One run at a time; the next record is sent when the run waits again, and has done so for a moment. The clock starts when control
begins to append the record, and stops in the task's own code.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

from bench.installation import installation
from helmr.client import AsyncClient

#: Seconds that a run waits before it is woken: its process has been ended by then, where it is not kept.
_REST = 0.1


async def delays(client: AsyncClient, task: str, times: int) -> list[float]:
    """Seconds of each wake-up."""
    started = await client.sessions.start(task, times)
    notes = client.sessions.open(started.session).input("notes")
    sent: list[float] = []
    async for event in started.run.events():
        if event.kind == "waiting":
            await asyncio.sleep(_REST)
            sent.append((await notes.send(len(sent))).at.timestamp())
    woken: list[float] = await started.run.result()
    return [after - before for before, after in zip(sent, woken, strict=True)]


def told(name: str, found: list[float]) -> None:
    """One line."""
    ordered = sorted(found)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{name}: n={len(found)} p50={statistics.median(found) * 1000:.1f} ms p99={p99 * 1000:.1f} ms")


async def main(engine: str, times: int, parked: int) -> None:
    """Measure both."""
    async with installation(engine, 2) as running:
        client = running.client
        await delays(client, "wakes", 5)
        told("hot", await delays(client, "wakes", times))
        told("parked", await delays(client, "wakes-parked", parked))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="process", choices=["process", "docker"])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--parked", type=int, default=50)
    given = parser.parse_args()
    asyncio.run(main(given.engine, given.times, given.parked))
