"""How long a no-op task takes from the client's ``sessions.start`` to its body, its first output byte and its end.

    .venv/bin/python -m bench.start --engine process --runs 200 --throughput 1000 --in-flight 16
    .venv/bin/python -m bench.start --engine docker --runs 50 --raw

First one run after the other on a live workspace, and one a second in fresh ones. The moment of the body is the task's own
(the monotonic clock is the same for all processes of a machine); the first byte is taken at a live subscriber of the run's log
subject. With ``--raw`` all of it in one interleaved loop with a fresh workspace and, on Docker, ``docker run`` and
``docker exec`` of the same image; fresh workspaces that found a container ready and those that had to wait for one are told
apart. Then the steps of the preparation, and runs per second end to end over ``--live`` live workspaces, with the processor
time of each part: a figure that holds on a busy machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nats.aio.msg import Msg

from bench.installation import Installation, installation
from helmr import subjects
from helmr.client import AsyncClient
from worker.docker_engine import DockerEngine
from worker.engine import ImageSpec


class Sample(NamedTuple):
    """Milliseconds from the start; and of which run, if it was one."""

    body: float
    first_byte: float
    end: float
    run_id: str = ""


class Heard(NamedTuple):
    """When something was heard, and what, in seconds of the monotonic clock."""

    at: float
    said: bytes


class Follower:
    """Hears the first output byte and the end of every run of the project, as any subscriber would."""

    def __init__(self, client: AsyncClient) -> None:
        self._wire = client.wire
        self._heard: dict[tuple[str, str], asyncio.Future[Heard]] = {}

    async def listen(self) -> None:
        """Subscribe, before anything is started."""
        scope = self._wire.scope
        await self._wire.nc.subscribe(subjects.log(scope, "*", "*", "stdout"), cb=self._note_byte)
        await self._wire.nc.subscribe(subjects.live(scope, "run", "*", "succeeded"), cb=self._note_end)
        await self._wire.nc.flush()

    async def _note_byte(self, msg: Msg) -> None:
        self._note(msg, "byte")

    async def _note_end(self, msg: Msg) -> None:
        self._note(msg, "end")

    def _note(self, msg: Msg, what: str) -> None:
        heard = self.when(msg.subject.split(".")[5], what)
        if not heard.done():
            heard.set_result(Heard(time.monotonic(), msg.data))

    def when(self, run_id: str, what: str) -> asyncio.Future[Heard]:
        """The moment something was heard of a run."""
        return self._heard.setdefault((run_id, what), asyncio.get_running_loop().create_future())


async def helmr(client: AsyncClient, follower: Follower, workspace: str | None) -> tuple[Sample, str]:
    """One run; also tells its workspace."""
    began = time.monotonic()
    started = await client.sessions.start("noop", workspace=workspace)
    first = await asyncio.wait_for(follower.when(started.run.id, "byte"), 60)
    end = await asyncio.wait_for(follower.when(started.run.id, "end"), 60)
    body, byte, over = ((moment - began) * 1e3 for moment in (int(first.said) / 1e9, first.at, end.at))
    return Sample(body, byte, over, started.run.id), started.session.workspace_id


async def command(*argv: str) -> Sample:
    """A command that says one word."""
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.read(1)
    first = (time.perf_counter() - began) * 1e3
    if await process.wait() != 0:
        raise SystemExit(f"{' '.join(argv)} failed: there is nothing to compare with")
    return Sample(first, first, (time.perf_counter() - began) * 1e3)


async def alone(client: AsyncClient, follower: Follower, runs: int, fresh: int) -> dict[str, list[Sample]]:
    """One run after the other on a live workspace; then ``fresh`` ones, a second apart: a machine is ready again by then."""
    _, live = await helmr(client, follower, None)
    samples = {"live workspace": [(await helmr(client, follower, live))[0] for _ in range(runs)]}
    for _ in range(fresh):
        await asyncio.sleep(1)
        samples.setdefault("fresh workspace", []).append((await helmr(client, follower, None))[0])
    return samples


async def interleaved(client: AsyncClient, follower: Follower, engine: str, runs: int) -> dict[str, list[Sample]]:
    """All variants, one after the other, ``runs`` times."""
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


class Throughput(NamedTuple):
    """Runs per second from the first start to the last end, and milliseconds of processor time per run by part."""

    rate: float
    cpu: dict[str, float]


async def throughput(place: Installation, follower: Follower, runs: int, live: int, in_flight: int) -> Throughput:
    """Start runs as fast as ``in_flight`` unfinished ones at a time allow."""
    client = place.client
    workspaces = [(await helmr(client, follower, None))[1] for _ in range(live)]
    for number in range(2 * live):
        await helmr(client, follower, workspaces[number % live])
    account = place.account()
    before, began = account.read(), time.monotonic()
    numbers = iter(range(runs))

    async def starter() -> None:
        for number in numbers:
            started = await client.sessions.start("noop", workspace=workspaces[number % live])
            await follower.when(started.run.id, "end")

    await asyncio.gather(*(starter() for _ in range(in_flight)))
    took = time.monotonic() - began
    return Throughput(runs / took, {name: (used - before[name]) / runs * 1e3 for name, used in account.read().items()})


async def steps(client: AsyncClient, samples: list[Sample]) -> list[dict[str, float]]:
    """What each run's preparation consisted of, in seconds."""
    lists = [await client.runs.events.list(sample.run_id) for sample in samples]
    return [next(event.data["stages"] for event in events if event.kind == "started") for events in lists]


async def report(client: AsyncClient, samples: dict[str, list[Sample]]) -> None:
    """A table of medians and 99th percentiles, and one of steps."""
    print(
        f"{'ms from start to':28}{'body p50':>9}{'p99':>8}{'byte p50':>10}{'p99':>8}{'end p50':>9}{'p99':>8}{'runs':>6}"
    )
    prepared = {}
    for name, taken in samples.items():
        if not taken[0].run_id:
            print_row(name, taken)
            continue
        found = list(zip(taken, await steps(client, taken), strict=True))
        for new in (False, True):
            part = [(sample, each) for sample, each in found if ("container" in each) == new]
            if part:
                label = name + ", new container" * new
                print_row(label, [sample for sample, _ in part])
                prepared[label] = [each for _, each in part]
    print("steps, ms p50:")
    for name, each in prepared.items():
        medians = {step: statistics.median(s.get(step, 0.0) for s in each) * 1e3 for step in each[0]}
        print(f"{name:28}", ", ".join(f"{step} {median:.2f}" for step, median in medians.items()))


def print_row(name: str, taken: list[Sample]) -> None:
    """One line of the table."""
    columns = zip(*(sample[:3] for sample in taken), strict=True)
    row = [value for column in columns for value in spread(list(column))]
    print(
        f"{name:28}{row[0]:>9.1f}{row[1]:>8.1f}{row[2]:>10.1f}{row[3]:>8.1f}{row[4]:>9.1f}{row[5]:>8.1f}{len(taken):>6}"
    )


def spread(values: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "process"), default="docker")
    parser.add_argument("--runs", type=int, default=100, help="runs one after the other")
    parser.add_argument("--fresh", type=int, default=20, help="without --raw: runs in fresh workspaces, a second apart")
    parser.add_argument("--raw", action="store_true", help="beside fresh workspaces and the engine's own commands")
    parser.add_argument("--throughput", type=int, default=600, help="runs in the throughput measurement; 0: none")
    parser.add_argument("--live", type=int, default=4, help="live workspaces in the throughput measurement")
    parser.add_argument("--in-flight", type=int, default=16, help="unfinished runs at a time")
    parser.add_argument("--slots", type=int, default=8, help="of the worker")
    parser.add_argument("--no-projector", action="store_true", help="measure while the projector stands still")
    return parser.parse_args()


async def main() -> None:
    """Measure and print."""
    options = arguments()
    async with installation(options.engine, options.slots) as place:
        with place.paused_projector() if options.no_projector else contextlib.nullcontext():
            follower = Follower(place.client)
            await follower.listen()
            print(f"{options.engine} engine, {options.runs} runs each, {platform.platform()}")
            if options.raw:
                samples = await interleaved(place.client, follower, options.engine, options.runs)
            else:
                samples = await alone(place.client, follower, options.runs, options.fresh)
            await report(place.client, samples)
            if options.throughput:
                done = await throughput(place, follower, options.throughput, options.live, options.in_flight)
                print(f"{done.rate:.0f} runs/s end to end: {options.throughput} runs, {options.in_flight} in flight")
                parts = ", ".join(f"{name} {used:.2f}" for name, used in done.cpu.items())
                print(f"ms of processor time per run: {parts}; together {sum(done.cpu.values()):.2f}")


if __name__ == "__main__":
    asyncio.run(main())
