"""What thousands of runs that wait for a record cost while they wait, and how long it takes to wake and execute all of them.

    .venv/bin/python -m bench.parked --runs 10000
    .venv/bin/python -m bench.parked --runs 200 --engine docker

The runs are started, each in a workspace of its own, and wait until the last of them is parked: no process, no container. Then
one record is sent to each session, so many at a time. The clock starts with the first record, and stops at the last run's
``succeeded`` event. With ``--engine none`` a real worker executes nothing (:mod:`bench.noop_engine`). Memory is what the
server's three processes have resident, read when all is parked and compared with what it was after the first hundred.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bench.cpu import children
from bench.installation import Installation, installation, server
from bench.noop_engine import NoopEngine
from helmr import local, subjects
from helmr.client import AsyncClient
from helmr.connection import connect
from worker.worker import Worker

_TASK = "sleeper"
#: Requests of the client at the same time.
_AT_A_TIME = 32
#: Runs that are started and woken before anything is measured.
_FIRST = 100


class Milestones:
    """When how many runs were how far, from their live events."""

    def __init__(self, wanted: int) -> None:
        self._left = dict.fromkeys(("waiting", "wait_completed", "succeeded"), wanted)
        self._done = {kind: asyncio.Event() for kind in self._left}
        self.at: dict[str, float] = {}
        self.failed = 0

    async def follow(self, client: AsyncClient) -> None:
        """Listen from now on."""
        for kind in self._left:
            await client.wire.nc.subscribe(subjects.live(client.scope, "run", "*", kind), cb=self._note(kind))
        await client.wire.nc.subscribe(subjects.live(client.scope, "run", "*", "failed"), cb=self._give_up)

    async def _give_up(self, _: object) -> None:
        """A run that fails gets nowhere: nobody is to wait for it."""
        self.failed += 1
        for done in self._done.values():
            done.set()

    def _note(self, kind: str) -> Callable[[object], Awaitable[None]]:
        async def note(_: object) -> None:
            self._left[kind] -= 1
            if self._left[kind] == 0:
                self.at[kind] = time.perf_counter()
                self._done[kind].set()

        return note

    async def reached(self, kind: str) -> float:
        """When all runs were there."""
        await self._done[kind].wait()
        if self.failed:
            raise SystemExit("a run has failed: the machine is too busy, or Helmr is broken")
        return self.at[kind]


def resident(pid: int) -> dict[str, float]:
    """MB of memory by part of the server."""
    found = {"control": _resident(pid)}
    for child in children(pid):
        words = Path(f"/proc/{child}/cmdline").read_text()
        found["projector" if "store.main" in words else "nats-server"] = _resident(child)
    return found


def _resident(pid: int) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024


@asynccontextmanager
async def without_executing(slots: int) -> AsyncIterator[Installation]:
    """An installation whose worker, in this process, has the engine that does nothing."""
    async with server() as (environment, client, pid):
        with tempfile.TemporaryDirectory(prefix="helmr-bench-worker-") as folder:
            home = Path(folder)
            engine = NoopEngine(home / "workspaces")
            nc = await connect(local.find(Path(environment["HELMR_HOME"])), name="bench-worker")
            worker = Worker(nc, engine, await engine.check(), home=home, slots=slots)
            stop, ready = asyncio.Event(), asyncio.Event()
            working = asyncio.create_task(worker.run(stop, ready))
            await ready.wait()
            try:
                yield Installation(client, pid, 0, environment)
            finally:
                stop.set()
                await working
                await nc.close()


async def side_by_side(work: Callable[[str], Awaitable[str]], items: list[str]) -> list[str]:
    """What ``work`` makes of each item, so many at a time."""
    limit = asyncio.Semaphore(_AT_A_TIME)

    async def one(item: str) -> str:
        async with limit:
            return await work(item)

    return await asyncio.gather(*(one(item) for item in items))


async def through(running: Installation, runs: int, *, rest: float, told: bool) -> dict[str, float]:
    """Start so many runs, wake them, and see them end; the memory when all had been parked for ``rest`` seconds."""
    client = running.client
    milestones = Milestones(runs)
    await milestones.follow(client)

    async def start(_: str) -> str:
        return (await client.sessions.start(_TASK)).session.id

    async def send(session: str) -> str:
        return (await client.sessions.open(session).input("notes").send(1)).id

    began = time.perf_counter()
    sessions = await side_by_side(start, [""] * runs)
    parked = await milestones.reached("waiting")
    await asyncio.sleep(rest)  # the last of them are still being parked, and the history is being written
    memory = resident(running.server)
    account = running.account()
    before = account.read()
    first = time.perf_counter()
    await side_by_side(send, sessions)
    sent = time.perf_counter() - first
    woken = await milestones.reached("wait_completed") - first
    ended = await milestones.reached("succeeded") - first
    after = account.read()
    if told:
        print(f"{runs} runs started and parked in {parked - began:.0f} s")
        print(f"records sent in {sent:.1f} s; all woken after {woken:.1f} s, all ended after {ended:.1f} s")
        used = ", ".join(f"{name} {(after[name] - before[name]) / runs * 1e3:.1f}" for name in after if after[name])
        print(f"milliseconds of processor time per run, from the record to its end: {used}")
    return memory


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--engine", choices=("none", "process", "docker"), default="none")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument(
        "--rest", type=float, default=5.0, help="seconds all are parked before memory is read and they are woken"
    )
    given = parser.parse_args()
    made = without_executing(given.slots) if given.engine == "none" else installation(given.engine, given.slots)
    async with made as running:
        before = await through(running, min(_FIRST, given.runs), rest=5, told=False)
        after = await through(running, given.runs, rest=given.rest, told=True)
    parts = ", ".join(f"{name} {after[name]:.0f} MB ({after[name] - before[name]:+.0f})" for name in after)
    print(f"server while all were parked: {sum(after.values()):.0f} MB: {parts}")
    print(f"grown by {sum(after.values()) - sum(before.values()):.0f} MB")


if __name__ == "__main__":
    asyncio.run(main())
