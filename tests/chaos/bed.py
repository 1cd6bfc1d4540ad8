"""One run of the test-bed: bring the installation up, load it, break it by plan, let it calm down, and judge what happened."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from bus import topology
from helmr.client import AsyncClient
from helmr.connection import connected
from helmr.errors import HelmrError
from helmr.guest.tree import become_subreaper
from store.verify import verify
from tests import leaks
from tests.chaos import evidence, faults
from tests.chaos.checker import Case, Violation, check
from tests.chaos.evidence import Evidence, Stored
from tests.chaos.installation import Installation, installation
from tests.chaos.load import LIMITS, Load
from tests.chaos.machines import gone

PROJECT = Path(__file__).parent / "project"
#: Seconds without a single event, once the last fault is over, after which a run that has not ended is stuck.
QUIET = 90.0
#: Seconds that a backlog may take to end in any case: an overloaded machine is slow, and nothing is wrong with that.
_BACKLOG = 1200.0
#: How often the history is compared with the log, until NATS has answered every read of that in time.
_TRIES = 3
#: Seconds in which the lanes of dead workers must be gone.
_LANES = 30.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to do: ``seconds`` of faults from ``seed``, of these kinds, on that engine."""

    seed: int
    seconds: float = 60.0
    engine: str = "process"
    #: Mean seconds between two starts.
    every: float = 0.2
    kinds: tuple[str, ...] = faults.KINDS
    #: Instead of a plan from the seed.
    plan: tuple[faults.Fault, ...] | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    violations: list[Violation]
    #: What was done, and what came of it, by name.
    figures: dict[str, int | float]
    evidence: Evidence


async def run(options: Options, folder: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Run the test-bed in ``folder``."""
    rng = random.Random(options.seed)
    plan = options.plan
    if plan is None:
        drawn = random.Random(rng.random())
        plan = tuple(faults.plan(drawn, seconds=options.seconds, kinds=options.kinds, engine=options.engine))
    become_subreaper()  # what a killed part leaves behind is then below us, and not overlooked
    before = leaks.descendants()
    # Half of the seeds have an engine whose containers outlive it.
    async with installation(folder, engine=options.engine, live_restore=options.seed % 2 == 0) as running:
        async with AsyncClient(running.client.url, project="chaos", env="test", home=folder) as client:
            await client.deployments.deploy(PROJECT)
            say(f"up; {len(plan)} faults in {options.seconds:g} s")
            marks = folder / "marks"
            marks.mkdir()
            told = {} if options.engine == "docker" else {"marks": str(marks)}
            load = Load(client, random.Random(rng.random()), told, every=options.every)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.run(options.seconds))
                tasks.create_task(faults.carry_out(list(plan), running, say))
        say(f"{len(load.starts)} starts acknowledged; waiting for everything to end")
        began = time.monotonic()
        await running.ready()
        await _calm_down(running, load)
        calm = time.monotonic() - began
        found = await _collect(running, load, before)
    left = [f"process {pid}: {command}" for pid, command in leaks.left_running(before).items()]
    found = msgspec.structs.replace(found, leaks=(*found.leaks, *left))
    return Report(violations=check(found), figures=_figures(found, running, load, len(plan), calm), evidence=found)


async def _calm_down(running: Installation, load: Load) -> None:
    """Wait until every run of the log has ended, or nothing of any run has been heard for too long."""
    open_runs = {start.run_id for start in load.starts}
    began = progress = time.monotonic()
    read = 0
    async with connected(running.nats.url, name="chaos-calm") as nc:
        while time.monotonic() < min(progress + QUIET, began + _BACKLOG):
            news = await evidence.read_on(nc, topology.RUNS, read)
            if news:
                read, progress = news[-1].seq, time.monotonic()
            for run_id, entries in Case(Evidence(runs=tuple(news))).runs.items():
                ended = entries[-1].event.state.terminal
                open_runs = open_runs - {run_id} if ended else open_runs | {run_id}
            if not open_runs:
                return
            await asyncio.sleep(0.5)  # of many runs: nothing tells when the last has ended


async def _collect(running: Installation, load: Load, before: dict[int, str]) -> Evidence:
    left = await _lanes_left(running)
    differences = await _differences(running)
    streams = await evidence.read_streams(running.nats.url)
    await running.stop_workers()
    left += await evidence.leaked_consumers(running.nats.url, set())
    tasks = leaks.left_running(before | _infrastructure(running))
    engine = running.engine
    left += [
        f"process {pid}: {command}"
        for pid, command in tasks.items()
        if engine is None or not engine.is_own(command)  # what is below one counts
    ]
    left += [f"machine {machine}" for machine in await gone(running.machines)]
    if running.containers is not None:
        left += [f"volume {name}" for name in await running.containers.volumes()]
    left += [f"folder {path}" for path in running.folder.glob("host-*/processes/*/*")]
    crashes = [f"{member.name}: {crash}" for member in running.members.values() for crash in member.crashes]
    return Evidence(
        runs=streams[topology.RUNS],
        logs=streams[topology.LOGS],
        records=streams[topology.SESSIONS],
        marks=evidence.read_marks(running.folder),
        starts=tuple(load.starts),
        answers=tuple(load.answers),
        cancels=frozenset(load.cancels),
        limits=LIMITS,
        differences=tuple(differences),
        leaks=tuple(left),
        crashes=(*crashes, *load.surprises),
    )


def _infrastructure(running: Installation) -> dict[int, str]:
    """What is meant to live on while the workers are gone."""
    kept = [pid for name in ("nats", "containerd", "engine", "server", "control") for pid in running.pids(name)]
    return dict.fromkeys(kept, "") | {
        pid: command for root in kept for pid, command in leaks.descendants(root=root).items()
    }


async def _lanes_left(running: Installation) -> list[str]:
    """Lane consumers of dead workers, once control has had the time to remove them."""
    deadline = time.monotonic() + _LANES
    alive = {member.ids[-1] for member in running.workers}
    while True:
        left = await evidence.leaked_consumers(running.nats.url, alive)
        if not left or time.monotonic() > deadline:
            return [f"consumer {name}" for name in left]
        await asyncio.sleep(0.5)  # control looks for them by the clock


async def _differences(running: Installation) -> list[str]:
    told = ""
    for _ in range(_TRIES):
        try:
            verified = await verify(running.nats.url, running.history)
        except HelmrError as error:
            told = f"cannot be compared: {error!r}"
        else:
            break
    else:
        return [told]
    return [
        f"{name}: {table.missing} rows missing, {table.extra} too many, of {table.rows}"
        for name, table in verified.tables.items()
        if table.missing or table.extra
    ]


def _figures(
    found: Evidence, running: Installation, load: Load, faults_done: int, calm: float
) -> dict[str, int | float]:
    case = Case(found)
    kinds = Counter(entry.event.kind for entries in case.runs.values() for entry in entries)
    ends = Counter(entries[-1].event.kind for entries in case.runs.values())
    return {
        "faults": faults_done,
        "runs": len(case.runs),
        "events": sum(kinds.values()),
        "leases": kinds["leased"],
        "leases lost": kinds["lease_lost"],
        "retries": kinds["retry_scheduled"],
        "tokens completed": len(case.completions),
        **{f"ended {kind}": count for kind, count in sorted(ends.items())},
        **{f"unanswered {name}": count for name, count in sorted(load.failures.items())},
        "starts given up": sum(member.gave_up for member in running.members.values()),
        "log bytes": sum(len(message.data) for message in found.logs),
        "marks": len(found.marks),
        "seconds to calm": round(calm, 1),
    }


def stored_json(messages: tuple[Stored, ...]) -> list[str]:
    """Messages as lines for a person to read."""
    return [
        f"{m.seq} {m.at:%H:%M:%S.%f} {m.subject} {m.headers} {m.data[:2000].decode(errors='replace')}" for m in messages
    ]
