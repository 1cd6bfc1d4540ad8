"""Limits of queues, end to end: exact, fair, and as true after any part was killed as before."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bus.lane_loads import MIN_BACKLOG
from bus.log import QUEUE, RUN, Log, Position
from bus.server import EmbeddedServer
from helmr.client import AsyncClient
from helmr.events import Draft, QueueEvent, RunEvent
from helmr.subjects import Scope
from tests.integration.parts import part, worker
from tests.integration.platform import Platform, control_of, history, kinds, running, until, write_project

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from pathlib import Path
    from helmr import Queue, Retry, task

    one = Queue("one", concurrency=1)
    two = Queue("two", concurrency=2)
    fair = Queue("fair", concurrency=4, concurrency_per_key=2)

    @task("quick", queue=one)
    def quick(payload: float = 0.0):
        time.sleep(payload)

    @task("pair", queue=two)
    def pair(payload: float = 0.0):
        time.sleep(payload)

    @task("shared", queue=fair)
    def shared(payload: float = 0.0):
        time.sleep(payload)

    @task("free")
    def free(payload: float = 0.0):
        time.sleep(payload)

    @task("again", queue=one, retry=Retry(max_attempts=2, min_delay="1s", jitter=False))
    def again():
        if not Path("seen").exists():
            Path("seen").touch()
            raise ValueError("once more")
"""


class Occupancy:
    """Who had a slot when, from the log alone: from ``queued`` on until the run ends, waits or is to be retried."""

    def __init__(self, platform: Platform, client: AsyncClient) -> None:
        self.platform = platform
        self.scope = Scope(*client.scope)

    async def changes(self, run_ids: Iterable[str]) -> list[tuple[int, str, int, str | None]]:
        found = []
        for run_id in run_ids:
            for seq, event in await self.stored(run_id):
                if event.kind == "queued" and event.data["cause"] != "redispatch":
                    found.append((seq, run_id, 1, event.state.concurrency_key))
                elif event.state.terminal or event.kind in {"waiting", "retry_scheduled"}:
                    found.append((seq, run_id, -1, event.state.concurrency_key))
        return sorted(found)

    async def stored(self, run_id: str) -> list[tuple[int, RunEvent]]:
        log, found, seq = self.platform.control.log, [], 0
        while (message := await log._get(f"helmr.ev.{self.scope}.run.{run_id}.>", after=seq)) is not None:
            seq = message[0]
            found.append((seq, RUN.decode(message[1])))
        return found

    async def most(self, run_ids: Iterable[str]) -> tuple[int, dict[str | None, int]]:
        """The most that had a slot at the same time: of all, and of each key."""
        used: Counter[str | None] = Counter()
        peak, peaks = 0, Counter[str | None]()
        for _, _, change, key in await self.changes(run_ids):
            used[key] += change
            peak = max(peak, used.total())
            peaks[key] = max(peaks[key], used[key])
        assert used.total() == 0
        return peak, dict(peaks)

    async def order(self, run_ids: Iterable[str]) -> list[str]:
        """The runs in the order in which they were dispatched first."""
        dispatched = [run_id for _, run_id, change, _ in await self.changes(run_ids) if change > 0]
        return list(dict.fromkeys(dispatched))


async def start(client: AsyncClient, task: str, number: int, *, seconds: float = 0.0, **options: Any) -> list[str]:
    started = await asyncio.gather(*(client.sessions.start(task, seconds, **options) for _ in range(number)))
    return [each.run.id for each in started]


async def finish(client: AsyncClient, run_ids: Iterable[str], *, status: str = "succeeded") -> None:
    ended = await asyncio.gather(*(client.runs.wait(run_id, timeout=60) for run_id in run_ids))
    assert {run.status for run in ended} == {status}


@asynccontextmanager
async def installation(home: Path, *, workers: int = 1, slots: int = 8) -> AsyncIterator[tuple[Platform, AsyncClient]]:
    async with running(home, workers=workers, slots=slots) as platform:
        yield platform, await platform.project("queues", TASKS)


async def holders(platform: Platform, client: AsyncClient, queue: str) -> set[str]:
    position = await platform.control.log.last(QUEUE, Scope(*client.scope), queue)
    return set(position.state.holders) if position.state else set()


async def released(platform: Platform, client: AsyncClient, queue: str) -> None:
    """Return once nobody has a slot of the queue."""
    changed = asyncio.Event()
    platform.control.live.listen_to_queues(lambda _: changed.set())
    async with asyncio.timeout(20):
        while await holders(platform, client, queue):
            await changed.wait()
            changed.clear()


async def test_a_limit_holds_and_slots_are_given_back(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        runs = await start(client, "pair", 12, seconds=0.05)
        await finish(client, runs)
        peak, _ = await Occupancy(platform, client).most(runs)
        assert peak == 2
        assert (await kinds(client, runs[0]))[:3] == ["held", "queued", "leased"]
        await released(platform, client, "two")


async def test_a_run_of_no_limited_queue_goes_straight_into_its_lane(tmp_path: Path) -> None:
    async with installation(tmp_path) as (_, client):
        [run] = await start(client, "free", 1)
        await finish(client, [run])
        assert (await kinds(client, run))[:2] == ["queued", "leased"]


async def test_each_key_has_the_limit_and_the_runs_without_one_together(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        keyed = {key: await start(client, "pair", 4, seconds=0.2, concurrency_key=key) for key in ("a", "b")}
        keyless = await start(client, "pair", 4, seconds=0.2)
        runs = [*keyed["a"], *keyed["b"], *keyless]
        await finish(client, runs)
        _, peaks = await Occupancy(platform, client).most(runs)
        assert peaks == {"a": 2, "b": 2, None: 2}


async def test_one_run_of_a_small_tenant_is_not_behind_all_of_a_big_one(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        big = await start(client, "shared", 40, seconds=0.05, concurrency_key="big")
        more = await start(client, "shared", 40, seconds=0.05, concurrency_key="also big")
        [small] = await start(client, "shared", 1, concurrency_key="small")
        await finish(client, [*big, *more, small])
        found = Occupancy(platform, client)
        peak, peaks = await found.most([*big, *more, small])
        assert peak == 4
        assert peaks == {"big": 2, "also big": 2, "small": 1}
        events = {run_id: await found.stored(run_id) for run_id in [*big, *more, small]}
        asked = events[small][0][0]
        admitted = next(seq for seq, event in events[small] if event.kind == "queued")
        between = [seq for run in big + more for seq, event in events[run] if event.kind == "queued"]
        assert len([seq for seq in between if asked < seq < admitted]) <= 4, "at most a round later"


async def test_priority_is_a_head_start(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        [first] = await start(client, "quick", 1, seconds=1.0)
        await until(client, first, "started")
        low = await start(client, "quick", 3)
        [high] = await start(client, "quick", 1, priority=60)
        await finish(client, [first, *low, high])
        order = await Occupancy(platform, client).order([first, *low, high])
        assert order[:2] == [first, high]


async def test_a_retried_run_gives_its_slot_to_others_meanwhile(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        again = (await client.sessions.start("again")).run.id
        await until(client, again, "retry_scheduled")
        [other] = await start(client, "quick", 1)
        await finish(client, [again, other])
        peak, _ = await Occupancy(platform, client).most([again, other])
        assert peak == 1
        assert [kind for kind in await kinds(client, again) if kind in {"held", "queued"}] == ["held", "queued"] * 2
        causes = [event.data["cause"] for event in await history(client, again) if event.kind == "queued"]
        assert causes == ["start", "retry"]


async def test_held_runs_are_cancelled_and_expire_at_once(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        [first] = await start(client, "quick", 1, seconds=5.0)
        await until(client, first, "started")
        [unwanted], [hurried] = await start(client, "quick", 1), await start(client, "quick", 1, ttl=1.0)
        assert (await client.runs.get(unwanted)).status == "queued"
        assert (await client.runs.cancel(unwanted)).status == "cancelled"
        await finish(client, [hurried], status="expired")
        assert await holders(platform, client, "one") == {first}
        await client.runs.cancel(first, force=True)
        await released(platform, client, "one")


async def test_a_queue_leaves_one_event_in_the_log(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        scope, log = Scope(*client.scope), platform.control.log
        position: Position[QueueEvent] = Position(0, None)
        for _ in range(3):  # as left by processes that died right after it
            position = await log.append(QUEUE, scope, "one", position, Draft(kind="released"))
        async with control_of(platform.server):
            await _alone(log, scope, position.seq)
        await finish(client, await start(client, "quick", 3))
        await released(platform, client, "one")
        last = await log.last(QUEUE, scope, "one")
        assert last.state.cursor > 3
        await _alone(log, scope, last.seq)


async def _alone(log: Log, scope: Scope, seq: int) -> None:
    async with asyncio.timeout(10):
        while await log.sequences(QUEUE, scope, "one", before=seq):  # noqa: ASYNC110  # nobody tells of a deletion
            await asyncio.sleep(0.05)


async def test_two_control_processes_keep_one_limit(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client), control_of(platform.server):
        runs = await start(client, "pair", 60)
        await finish(client, runs)
        peak, _ = await Occupancy(platform, client).most(runs)
        assert peak == 2
        await released(platform, client, "two")


async def test_the_limit_outlives_control(tmp_path: Path) -> None:
    """A control process is killed again and again in the middle of admitting; what it left is finished or taken back."""
    async with installation(tmp_path) as (platform, client):
        folder = tmp_path / "parts"
        runs = await start(client, "pair", 40, seconds=0.02)
        for _ in range(4):
            environment = {"TMPDIR": str(folder)}  # a killed process tidies nothing up
            async with part(folder, "control", platform.server.url, environment=environment) as other:
                await asyncio.sleep(0.4)
                await other.kill()
        runs += await start(client, "pair", 20)
        await finish(client, runs)
        peak, _ = await Occupancy(platform, client).most(runs)
        assert peak == 2
        await released(platform, client, "two")


async def test_a_backlog_outlives_control(tmp_path: Path) -> None:
    """The only control process is killed while runs are held and executed; the next one goes on where it was."""
    server = EmbeddedServer(tmp_path, durability="relaxed")
    await server.start()
    environment = {"TMPDIR": str(tmp_path)}
    try:
        async with (
            part(tmp_path / "parts", "control", server.url, environment=environment) as first,
            AsyncClient(server.url, project="queues", env="test", home=tmp_path) as client,
        ):
            await client.deployments.deploy(write_project(tmp_path / "project", "queues", TASKS))
            runs = await start(client, "pair", 20, seconds=0.1)
            free = await start(client, "free", 40)
            async with worker(server.url, tmp_path) as only:
                await until(client, runs[0], "started")
                await first.kill()
                async with control_of(server) as control:
                    platform = Platform(tmp_path, server, control.nc, control)
                    await finish(client, runs + free)
                    found = Occupancy(platform, client)
                    assert (await found.most(runs))[0] == 2
                    assert len(await found.order(runs + free)) == 60
                    await released(platform, client, "two")
                    assert await only.end() == 0
    finally:
        await server.stop()


async def test_the_limit_outlives_the_server(tmp_path: Path) -> None:
    async with installation(tmp_path) as (platform, client):
        runs = await start(client, "pair", 40, seconds=0.05)
        for _ in range(2):
            assert platform.server.pid is not None
            platform.server._process.kill()  # type: ignore[union-attr]
            await asyncio.sleep(1.5)
        await finish(client, runs)
        peak, _ = await Occupancy(platform, client).most(runs)
        assert peak == 2


async def test_a_backlog_is_admitted_in_turns(tmp_path: Path) -> None:
    """Without any limit: what the workers cannot take yet waits outside of the lane, and tenants take turns."""
    async with running(tmp_path, workers=0) as platform:
        client = await platform.project("queues", TASKS)
        big = await start(client, "free", 100, concurrency_key="big")
        small = await start(client, "free", 2, concurrency_key="small", priority=0)
        [urgent] = await start(client, "free", 1, concurrency_key="big", priority=3600)
        assert (await kinds(client, small[0])) == ["held"]
        assert [event.data["limit"] for event in await history(client, small[0])] == ["backlog"]
        await platform.add_worker(slots=8)
        await finish(client, [*big, *small, urgent])
        found = Occupancy(platform, client)
        order = await found.order([*big, *small, urgent])
        straight = [(await kinds(client, run))[0] for run in big].count("queued")
        assert straight == MIN_BACKLOG
        assert order.index(urgent) <= straight + 2
        assert order.index(small[0]) <= straight + 2
