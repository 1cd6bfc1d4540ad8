"""How long a no-op task takes from the client's ``sessions.start`` to its first output byte and to its end.

    .venv/bin/python -m bench.start --engine docker --runs 50

Measured in one interleaved loop: a fresh workspace, a live workspace and, on Docker, raw ``docker run`` and ``docker exec`` of
the same image. The first byte is taken at a live subscriber of the run's log subject. After that, runs per second end to end
over ``--live`` live workspaces.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from bench.installation import installation
from helmr import subjects
from helmr.client import AsyncClient
from worker.docker_engine import DockerEngine
from worker.engine import ImageSpec


class Sample(NamedTuple):
    """Milliseconds from the start."""

    first_byte: float
    end: float


class Follower:
    """Hears the first output byte and the end of every run of the project, as any subscriber would."""

    def __init__(self, client: AsyncClient) -> None:
        self._wire = client.wire
        self._heard: dict[tuple[str, str], asyncio.Future[float]] = {}

    async def listen(self) -> None:
        """Subscribe, before anything is started."""
        scope = self._wire.scope
        await self._wire.nc.subscribe(subjects.log(scope, "*", "*", "stdout"), cb=self._note("byte", 5))
        await self._wire.nc.subscribe(subjects.live(scope, "run", "*", "succeeded"), cb=self._note("end", 5))
        await self._wire.nc.flush()

    def _note(self, what: str, token: int) -> Callable[..., Awaitable[None]]:
        async def note(msg: object) -> None:
            run_id = str(getattr(msg, "subject", "")).split(".")[token]
            heard = self.when(run_id, what)
            if not heard.done():
                heard.set_result(time.perf_counter())

        return note

    def when(self, run_id: str, what: str) -> asyncio.Future[float]:
        """The moment something was heard of a run."""
        return self._heard.setdefault((run_id, what), asyncio.get_running_loop().create_future())


async def helmr(client: AsyncClient, follower: Follower, workspace: str | None) -> tuple[Sample, str]:
    """One run; also tells its workspace."""
    began = time.perf_counter()
    started = await client.sessions.start("noop", workspace=workspace)
    first = await asyncio.wait_for(follower.when(started.run.id, "byte"), 60)
    end = await asyncio.wait_for(follower.when(started.run.id, "end"), 60)
    return Sample((first - began) * 1e3, (end - began) * 1e3), started.session.workspace_id


async def command(*argv: str) -> Sample:
    """A command that says one word."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.read(1)
    first = time.perf_counter()
    await process.wait()
    return Sample((first - began) * 1e3, (time.perf_counter() - began) * 1e3)


async def interleaved(client: AsyncClient, engine: str, runs: int) -> dict[str, list[Sample]]:
    """All variants, one after the other, ``runs`` times."""
    follower = Follower(client)
    await follower.listen()
    _, live = await helmr(client, follower, None)
    samples: dict[str, list[Sample]] = {"fresh workspace": [], "live workspace": []}
    image, container = await raw_container() if engine == "docker" else ("", "")
    try:
        for _ in range(runs):
            samples["fresh workspace"].append((await helmr(client, follower, None))[0])
            samples["live workspace"].append((await helmr(client, follower, live))[0])
            if engine == "docker":
                say = ("python3", "-c", "print('x')")
                samples.setdefault("docker run", []).append(await command("docker", "run", "--rm", image, *say))
                samples.setdefault("docker exec", []).append(await command("docker", "exec", container, *say))
    finally:
        if container:
            await output("docker", "rm", "-f", container)
    return samples


async def raw_container() -> tuple[str, str]:
    """The image Helmr uses, and a container of it that idles."""
    with tempfile.TemporaryDirectory(prefix="helmr-bench-") as home:
        image = await DockerEngine(Path(home)).ensure_image(ImageSpec(), print)
    idle = await output("docker", "run", "-d", image, "python3", "-c", "import signal; signal.pause()")
    return image, idle.strip()


async def output(*argv: str) -> str:
    """What a command prints."""
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    data, _ = await process.communicate()
    return data.decode()


async def throughput(client: AsyncClient, runs: int, live: int) -> float:
    """Runs per second, from the first start to the last end."""
    follower = Follower(client)
    await follower.listen()
    workspaces = [(await helmr(client, follower, None))[1] for _ in range(live)]
    began = time.perf_counter()
    limit = asyncio.Semaphore(64)

    async def one(number: int) -> float:
        async with limit:
            started = await client.sessions.start("noop", workspace=workspaces[number % live])
        return await follower.when(started.run.id, "end")

    ends = await asyncio.gather(*(one(number) for number in range(runs)))
    return runs / (max(ends) - began)


def report(samples: dict[str, list[Sample]]) -> None:
    """A table of medians and 99th percentiles."""
    print(f"{'':18}{'first byte p50':>16}{'p99':>9}{'end p50':>10}{'p99':>9}   ms")
    for name, taken in samples.items():
        row = [*spread([s.first_byte for s in taken]), *spread([s.end for s in taken])]
        print(f"{name:18}{row[0]:>16.1f}{row[1]:>9.1f}{row[2]:>10.1f}{row[3]:>9.1f}")


def spread(values: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("docker", "process"), default="docker")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--throughput", type=int, default=500, help="runs in the throughput measurement; 0: none")
    parser.add_argument("--live", type=int, default=4, help="live workspaces in the throughput measurement")
    options = parser.parse_args()
    async with installation(options.engine, slots=8) as client:
        samples = await interleaved(client, options.engine, options.runs)
        print(f"{options.engine} engine, {options.runs} runs each, {platform.platform()}")
        report(samples)
        if options.throughput:
            rate = await throughput(client, options.throughput, options.live)
            print(f"{rate:.0f} runs/s end to end ({options.throughput} runs over {options.live} live workspaces)")


if __name__ == "__main__":
    asyncio.run(main())
