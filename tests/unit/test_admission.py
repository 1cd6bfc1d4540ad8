"""Two control processes, one queue, and a schedule that lets each of them lag, lose and die anywhere: the limit holds.

Admission, the live runs, the log and the rules are the real ones; the stream is a list with compare-and-set. A process that is
killed stops at one of its appends, before or after it is stored, and another one begins with nothing but the log.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any, cast

import msgspec
import pytest

from bus import admission as module
from bus.admission import Admission
from bus.deployments import Deployments
from bus.held import pool_of
from bus.lane_loads import MIN_BACKLOG, LaneLoads
from bus.live import LiveRuns
from bus.log import QUEUE, RUN, Position
from bus.presence import Presence
from bus.queueing import Applicant, enqueue, redispatch
from bus.stored import Superseded
from helmr import subjects
from helmr.events import Draft, RunState
from helmr.models import Deployment
from helmr.reducers import queue as queue_rules
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.unit.memory_log import MemoryLog
from tests.unit.runs import START, spec

pytestmark = pytest.mark.anyio

SCOPE = Scope("acme", "dev")


class Killed(Exception):
    """The control process ends here."""


class NobodyThere(Presence):
    """No workers: lanes have the least room."""

    def __init__(self) -> None:
        """Without a connection."""

    def alive(self) -> dict[str, Any]:
        return {}


class Declared(Deployments):
    """One deployment with one queue; the limits may change."""

    def __init__(self, concurrency: int | None, per_key: int | None = None) -> None:
        self.declare(concurrency, per_key)

    def declare(self, concurrency: int | None, per_key: int | None = None) -> None:
        queues = [{"name": "reviews", "concurrency": concurrency, "concurrency_per_key": per_key}]
        made = Deployment(
            id="dep_1",
            version="1",
            project="acme",
            environment="dev",
            content_hash="c",
            archive="a",
            archive_bytes=1,
            created_at=START,
            index={"queues": queues},
        )
        self._by_id, self._current = {"dep_1": made}, {SCOPE: "dep_1"}


class Process:
    """A control process: it knows the first ``known`` messages of the log, and may be told to die at an append."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.live = LiveRuns()
        self.log = _DyingLog(world.log.messages)
        self.admission = Admission(self.log, self.live, asyncio.Event(), world.declared, NobodyThere())
        self.known = 0
        self.learn(len(world.log.messages))

    def learn(self, number: int) -> None:
        """Hear of some more messages."""
        for subject, body in self.world.log.messages[self.known : self.known + number]:
            self.known += 1
            if subject.split(".")[6] not in {"started", "journal"}:
                self.live.take(self.known, subject, body)

    async def round(self) -> bool:
        """One round of admission; False when it died in it."""
        try:
            await self.admission._round()
        except Killed:
            return False
        return True

    def patient(self) -> None:
        """Time has passed: pools are yielded no longer."""
        self.admission._deferred.clear()


class _DyingLog(MemoryLog):
    """Shares the messages; ``dies_at`` counts down at every append, ``stored`` says whether that one still counts."""

    def __init__(self, messages: list[tuple[str, bytes]]) -> None:
        super().__init__()
        self.messages = messages
        self.dies_at = -1
        self.stored = False

    async def _publish(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        if self.dies_at == 0 and not self.stored:
            raise Killed
        seq = await super()._publish(subject, body, headers)
        if self.dies_at == 0:
            raise Killed
        self.dies_at -= 1
        return seq


class World:
    """The log, the control processes, and workers that do whatever a schedule says."""

    def __init__(self, concurrency: int | None, per_key: int | None = None, *, processes: int = 2) -> None:
        self.log = MemoryLog()
        self.declared = Declared(concurrency, per_key)
        self.bounds = queue_rules.limits(concurrency, per_key)
        self.processes = [Process(self) for _ in range(processes)]
        self.started = 0

    async def start(self, key: str | None = None, *, queue: str | None = "reviews", **changes: Any) -> str:
        run_id = f"run_{self.started:05}"
        self.started += 1
        made = spec(queue=queue, concurrency_key=key, **changes)
        limit = self.processes[0].admission.gate(SCOPE, run_id, cast(Applicant, made), "default")
        draft = rules.create(made, cause="start", lane="default", limit=limit)
        await self.log.append(RUN, SCOPE, run_id, Position(0, None), draft)
        return run_id

    async def state(self, run_id: str) -> RunState:
        return (await self.log.present(RUN, SCOPE, run_id)).state

    async def runs(self) -> dict[str, RunState]:
        return {f"run_{n:05}": await self.state(f"run_{n:05}") for n in range(self.started)}

    async def move(self, run_id: str, draft: Draft | None) -> None:
        if draft is not None:
            await self.log.append(RUN, SCOPE, run_id, await self.log.last(RUN, SCOPE, run_id), draft)

    async def work(self, run_id: str, chance: random.Random) -> None:
        """What the world may do to a run next."""
        state = await self.state(run_id)
        if state.status == "queued" and state.dispatch is not None:
            await self.move(run_id, rules.lease(state, worker="wrk_a", dispatch=state.dispatch))
        elif state.status == "running":
            await self._leave(run_id, state, chance)
        elif state.status == "waiting":
            await self.move(run_id, Draft(kind="wait_completed"))
            await self._queue(run_id, "resume", chance)
        elif state.status == "queued" and state.hold is None:
            await self._queue(run_id, "retry", chance)
        elif chance.random() < 0.05 and not state.terminal:
            await self.move(run_id, rules.cancelled("enough"))

    async def _leave(self, run_id: str, state: RunState, chance: random.Random) -> None:
        match chance.randrange(5):
            case 0:
                await self.move(run_id, Draft(kind="waiting", data={"kind": "timer"}))
            case 1 if state.next_attempt < 4:
                data = {"attempt": state.next_attempt + 1, "at": START.isoformat()}
                await self.move(run_id, Draft(kind="retry_scheduled", data=data))
            case 2 if state.dispatch_attempt < rules.MAX_DISPATCH_ATTEMPTS:
                await self.move(run_id, rules.lose_lease(state, reason="gone"))
                await redispatch(self.log, SCOPE, run_id, dispatch=state.dispatch, lane="default")
            case _:
                await self.move(run_id, Draft(kind="succeeded"))

    async def _queue(self, run_id: str, cause: Any, chance: random.Random) -> None:
        gate = chance.choice(self.processes).admission.gate
        await enqueue(self.log, SCOPE, run_id, cause=cause, alive=set(), gate=gate)

    def check(self) -> None:
        """Read the whole log: at no time had more runs a slot than the limits allow."""
        slots: dict[str, str | None] = {}
        for subject, body in self.log.messages:
            parsed = subjects.parse_event(subject)
            if parsed.entity != "run":
                continue
            state = RUN.decode(body).state
            if state.slot is None:
                slots.pop(state.id, None)
            else:
                slots[state.id] = state.concurrency_key
            used = Counter(slots.values())
            assert self.bounds.total is None or used.total() <= self.bounds.total
            for key, count in used.items():
                limit = self.bounds.of(key)
                assert limit is None or count <= limit, f"{count} of {key} after {subject}"

    async def settle(self, chance: random.Random) -> None:
        """Let everything come to its end: nobody lags, nobody dies."""
        for _ in range(60 * self.started):
            for process in self.processes:
                process.learn(10**6)
                process.patient()
                assert await process.round()
            states = await self.runs()
            unfinished = [run_id for run_id, state in states.items() if not state.terminal]
            if not unfinished:
                break
            for run_id in unfinished:
                if states[run_id].status == "running":
                    await self.move(run_id, Draft(kind="succeeded"))
                else:
                    await self.work(run_id, chance)
        for process in self.processes:
            process.learn(10**6)
            process.patient()
            await process.round()

    async def holders(self) -> set[str]:
        position = await self.log.last(QUEUE, SCOPE, "reviews")
        return set(position.state.holders) if position.state else set()


@pytest.fixture(autouse=True)
def _unfinished_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a clock here: what is unfinished may be finished by anybody at any time."""
    monkeypatch.setattr(module, "_UNFINISHED", -1.0)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("limits", [(1, None), (2, None), (3, 1)], ids=str)
async def test_no_schedule_exceeds_the_limits_or_loses_a_run(limits: tuple[int, int | None], seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # a schedule that can be had again
    world = World(*limits)
    for _ in range(120):
        at = chance.randrange(len(world.processes))
        process = world.processes[at]
        match chance.randrange(6):
            case 0 if world.started < 14:
                await world.start(chance.choice([None, "a", "b"]), priority=chance.randrange(3))
            case 1 | 2:
                process.learn(chance.choice([1, 2, 5, 100]))
            case 3:
                process.log.dies_at = chance.choice([-1, -1, 0, 1, 2])
                process.log.stored = chance.random() < 0.5
                if not await process.round():
                    world.processes[at] = Process(world)
                else:
                    process.log.dies_at = -1
                if chance.random() < 0.5:
                    process.patient()
            case _ if world.started:
                await world.work(f"run_{chance.randrange(world.started):05}", chance)
    world.check()
    await world.settle(chance)
    world.check()
    assert all(state.terminal for state in (await world.runs()).values()), "nothing is lost"
    assert await world.holders() == set(), "nothing is kept"


async def test_the_check_sees_a_run_that_has_no_grant() -> None:
    """A mutation: somebody dispatches a held run without asking the queue."""
    world = World(1)
    for _ in range(2):
        run_id = await world.start()
        await world.move(run_id, rules.admit(await world.state(run_id), held=1, lane="default"))
    with pytest.raises(AssertionError):
        world.check()


@pytest.mark.parametrize("stored", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_death_between_the_appends_leaves_something_to_finish(at: int, *, stored: bool) -> None:
    world = World(2, processes=1)
    runs = [await world.start() for _ in range(4)]
    process = world.processes[0]
    process.learn(100)
    process.log.dies_at, process.log.stored = at, stored
    assert not await process.round()
    heir = Process(world)
    await heir.round()
    heir.learn(100)
    await heir.round()
    states = [await world.state(run_id) for run_id in runs]
    assert [state.dispatch is not None for state in states] == [True, True, False, False]
    assert await world.holders() == set(runs[:2])


async def test_whoever_knows_less_takes_no_slot_away() -> None:
    """The run waits, is woken and admitted again by one process; another one has heard of the wait alone."""
    world = World(1)
    quick, slow = world.processes
    run_id = await world.start()
    chance = random.Random(1)  # noqa: S311
    for process in world.processes:
        process.learn(100)
    await quick.round()
    await world.work(run_id, chance)
    await world.move(run_id, Draft(kind="waiting", data={"kind": "timer"}))
    slow.learn(100)
    await world.move(run_id, Draft(kind="wait_completed"))
    await enqueue(world.log, SCOPE, run_id, cause="resume", alive=set(), gate=quick.admission.gate)
    quick.learn(100)
    await quick.round()
    assert (await world.state(run_id)).dispatch is not None
    await slow.round()
    slow.patient()
    await slow.round()
    assert await world.holders() == {run_id}


async def test_a_run_that_is_not_heard_of_yet_has_not_ended() -> None:
    world = World(1)
    quick, slow = world.processes
    run_id = await world.start()
    quick.learn(100)
    await quick.round()
    await slow.admission._learn([(SCOPE, "reviews")])
    await slow.round()
    assert await world.holders() == {run_id}


async def test_a_loser_leaves_the_queue_to_the_winner_for_a_while() -> None:
    world = World(1)
    quick, slow = world.processes
    await world.start()
    quick.learn(100)
    slow.learn(100)
    await quick.round()
    before = len(world.log.messages)
    await slow.round()
    assert list(slow.admission._deferred) == [(SCOPE, "reviews")]
    slow.learn(100)
    await slow.round()
    assert len(world.log.messages) == before


async def test_a_limit_that_a_deployment_lowers_lets_nobody_in_until_there_is_room() -> None:
    world = World(2, processes=1)
    process = world.processes[0]
    runs = [await world.start() for _ in range(4)]
    process.learn(100)
    await process.round()
    world.declared.declare(1)
    chance = random.Random(1)  # noqa: S311
    for ended in runs[:2]:
        assert await world.holders() <= set(runs[:2])
        await world.work(ended, chance)
        await world.move(ended, Draft(kind="succeeded"))
        process.learn(100)
        await process.round()
    assert await world.holders() == {runs[2]}


async def test_a_limit_that_a_deployment_introduces_counts_what_executes_already() -> None:
    world = World(None, processes=1)
    process = world.processes[0]
    early = await world.start()
    process.learn(100)
    world.declared.declare(1)
    late = await world.start()
    process.learn(100)
    await process.round()
    assert ((await world.state(early)).dispatch, (await world.state(late)).dispatch) == (1, None)
    await world.move(early, rules.cancelled("enough"))
    process.learn(100)
    await process.round()
    assert await world.holders() == {late}


async def test_a_limit_that_is_gone_lets_everybody_in() -> None:
    world = World(1, processes=1)
    process = world.processes[0]
    for _ in range(5):
        await world.start()
    process.learn(100)
    world.declared.declare(None)
    await process.round()
    assert all(state.dispatch is not None for state in (await world.runs()).values())


class TestBacklog:
    """Runs without any limit."""

    async def test_ten_thousand_of_one_tenant_do_not_stand_before_one_of_another(self) -> None:
        world = World(None, processes=1)
        process = world.processes[0]
        for _ in range(MIN_BACKLOG):
            await world.start("big", queue=None)
        process.learn(10**6)
        for number in range(10_000):
            process.live.take(*_message(10**6 + number, f"big_{number}", _held("big")))
        process.live.take(*_message(10**7, "small", _held("small")))
        order = process.admission.held.pool("default")
        assert (len(order), order.ahead("small")) == (10_001, 1)

    async def test_the_lane_is_filled_as_it_drains(self) -> None:
        world = World(None, processes=1)
        process = world.processes[0]
        straight = []
        for _ in range(MIN_BACKLOG + 6):
            straight.append(await world.start(queue=None))
            process.learn(10)
        held = [run_id for run_id, state in (await world.runs()).items() if state.hold is not None]
        assert len(held) == 6
        await process.round()
        assert [run_id for run_id, state in (await world.runs()).items() if state.hold is not None] == held
        for run_id in straight[:2]:
            await world.work(run_id, random.Random(1))  # noqa: S311
        process.learn(100)
        await process.round()
        now = [run_id for run_id, state in (await world.runs()).items() if state.hold is not None]
        assert now == held[2:]

    async def test_a_burst_is_counted_before_it_is_heard_of(self) -> None:
        world = World(None, processes=1)
        for _ in range(MIN_BACKLOG + 6):
            await world.start(queue=None)
        held = [run_id for run_id, state in (await world.runs()).items() if state.hold is not None]
        assert len(held) == 6
        world.processes[0].learn(10**6)
        assert world.processes[0].admission.lanes.waiting("default") == MIN_BACKLOG

    def test_a_start_that_was_never_heard_of_takes_no_room_for_long(self) -> None:
        now = 0.0
        lanes = LaneLoads(NobodyThere(), clock=lambda: now)
        for number in range(MIN_BACKLOG):
            lanes.send(f"run_{number}", "default")
        assert lanes.room("default") == 0
        now = 5.1
        assert lanes.room("default") == MIN_BACKLOG

    async def test_a_newcomer_does_not_overtake_those_who_are_held(self) -> None:
        world = World(None, processes=1)
        process = world.processes[0]
        runs = []
        for _ in range(MIN_BACKLOG + 1):
            runs.append(await world.start(queue=None))
            process.learn(10)
        for run_id in runs[:5]:
            await world.work(run_id, random.Random(1))  # noqa: S311
        process.learn(100)
        assert process.admission.gate(SCOPE, "run_x", cast(Applicant, spec()), "default") == "backlog"
        assert process.admission.gate(SCOPE, "run_x", cast(Applicant, spec()), "other") is None

    async def test_a_queue_and_a_backlog_share_the_room(self) -> None:
        world = World(50, processes=1)
        process = world.processes[0]
        for _ in range(MIN_BACKLOG - 10):
            await world.start(queue=None)
        process.learn(10**6)
        for _ in range(50):
            await world.start()
        process.learn(10**6)
        await process.round()
        assert len(await world.holders()) == 10


def _held(key: str) -> Draft:
    return rules.create(spec(concurrency_key=key), cause="start", lane="default", limit="backlog")


def _message(seq: int, run_id: str, draft: Draft) -> tuple[int, str, bytes]:
    body = msgspec.json.encode(RUN.make(None, run_id, draft))
    return seq, subjects.event(SCOPE, "run", run_id, "held"), body


async def test_a_superseded_append_changes_nothing_that_waits() -> None:
    world = World(1)
    quick, slow = world.processes
    first, second = await world.start(), await world.start()
    for process in world.processes:
        process.learn(100)
    await quick.round()
    with pytest.raises(Superseded):
        await slow.log.append(QUEUE, SCOPE, "reviews", Position(0, None), Draft(kind="released"))
    await slow.round()
    waiting = {run.id for run in slow.live if pool_of(run) is not None}
    assert waiting == {first, second}
    assert set(slow.admission.held.pool((SCOPE, "reviews"))) == {first, second}
