"""How many machines are started ahead, of which kinds, and what becomes of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from helmr.errors import EngineUnavailable
from worker.engine import Limits, MachineSpec, Provision
from worker.pool import Demand, Kind, Pool

pytestmark = pytest.mark.anyio


def _spec(image: str, workspace: str = "ws_1", claim: int = 0) -> MachineSpec:
    return MachineSpec(workspace_id=workspace, worker_id="wrk", image=image, claim=claim, network=("a.example",))


A, B, C = (Kind.of(_spec(image)) for image in "abc")


def _with(source: str, owner: str = "acme.dev", image: str = "a") -> MachineSpec:
    provision = Provision(owner=owner, source=source, tree=Path("/tree"))
    return msgspec.structs.replace(_spec(image), provision=provision)


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_whose_a_machine_will_be_makes_no_difference_to_its_kind() -> None:
    assert Kind.of(_spec("a", "ws_2", 7)) == A
    assert A.spec() == MachineSpec(workspace_id="", worker_id="wrk", image="a", network=("a.example",))
    assert Kind.of(MachineSpec(workspace_id="x", worker_id="wrk", image="a", limits=Limits(cpu=1))) != A


def test_what_was_wanted_in_a_minute_is_kept_and_at_least_one_for_a_while() -> None:
    clock = _Clock()
    demand = Demand(clock)
    assert (demand.targets(4), demand.next_change()) == ({}, None)
    for _ in range(3):
        demand.note(A)
    assert demand.targets(4) == {A: 3}
    clock.now += 61
    assert demand.targets(4) == {A: 1}
    clock.now += 540
    assert demand.targets(4) == {}


def test_the_budget_is_kept_and_the_latest_kinds_come_first() -> None:
    clock = _Clock()
    demand = Demand(clock)
    for kind in (A, A, A, A, A, A, B, C):
        clock.now += 1
        demand.note(kind)
    assert demand.targets(2) == {C: 1, B: 1}
    assert demand.targets(4) == {C: 1, B: 1, A: 2}
    assert demand.targets(99) == {C: 1, B: 1, A: 6}
    demand.forget(A)
    assert demand.targets(99) == {C: 1, B: 1}


def test_a_target_that_will_fall_is_looked_at_then() -> None:
    clock = _Clock()
    demand = Demand(clock)
    demand.note(A)
    assert (demand.next_change() or 0) == pytest.approx(60)
    clock.now += 100
    assert (demand.next_change() or 0) == pytest.approx(500)


def test_one_of_several_is_bare_for_whoever_comes_with_other_code() -> None:
    clock = _Clock()
    demand = Demand(clock)
    old, theirs = Kind.of(_with("old")), Kind.of(_with("theirs", "other.dev", "b"))
    for kind in (theirs, old, old, old):
        clock.now += 1
        demand.note(kind)
    assert demand.targets(1) == {old: 1}
    assert demand.targets(4) == {old: 2, theirs: 1, A: 1}


def test_code_that_was_replaced_is_not_wanted_any_more_but_what_it_ran_in_is() -> None:
    clock = _Clock()
    demand = Demand(clock)
    old, theirs = Kind.of(_with("old")), Kind.of(_with("theirs", "other.dev", "b"))
    for kind in (theirs, old, old):
        clock.now += 1
        demand.note(kind)
    demand.retire("acme.dev", "new")
    demand.retire("other.dev", "theirs")
    assert demand.targets(9) == {A: 2, theirs: 1}


class _Member:
    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec
        self.lost = False
        self.stopped = asyncio.Event()
        self.provided: list[Provision] = []

    async def provide(self, provision: Provision) -> None:
        if provision.source == "broken":
            raise EngineUnavailable("gone")
        self.provided.append(provision)

    async def stop(self, grace: float = 2.0) -> None:
        assert grace == 0
        self.stopped.set()


class _Maker:
    """Makes members, and tells when there is one more; ``broken`` kinds cannot be made."""

    def __init__(self) -> None:
        self.made: list[_Member] = []
        self.tried = asyncio.Semaphore(0)
        self.broken: set[str] = set()

    async def __call__(self, spec: MachineSpec) -> _Member:
        self.tried.release()
        if spec.image in self.broken:
            raise EngineUnavailable("gone")
        self.made.append(_Member(spec))
        return self.made[-1]

    async def expect(self, number: int) -> None:
        for _ in range(number):
            await asyncio.wait_for(self.tried.acquire(), 60)


@pytest.fixture(autouse=True)
def no_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.pool._CALM", 0.0)


async def test_the_next_of_a_kind_is_there_and_no_other() -> None:
    maker = _Maker()
    pool = Pool(maker, 2)
    assert pool.take(_spec("a")) is None
    await maker.expect(1)
    assert pool.take(_spec("b")) is None
    assert pool.take(_spec("a", "ws_2")) is maker.made[0]
    await maker.expect(2)  # another a, and a b
    assert {each.spec.image for each in maker.made} == {"a", "b"}
    assert len(pool) == 2
    await pool.close()
    assert [each.stopped.is_set() for each in maker.made] == [False, True, True]


async def test_code_is_ready_in_a_machine_for_its_owners_runs_alone() -> None:
    maker = _Maker()
    pool = Pool(maker, 2)
    assert pool.take(_with("code")) is None
    await maker.expect(2)
    assert pool.take(_with("other")) is not maker.made[0]  # the bare one
    assert pool.take(_with("code", "other.dev")) is None
    assert pool.take(_with("code")) is maker.made[0]
    assert [each.source for each in maker.made[0].provided] == ["code"]
    await pool.close()


async def test_a_bare_machine_becomes_what_is_lacking() -> None:
    maker = _Maker()
    pool = Pool(maker, 2)
    pool.take(_with("code"))
    await maker.expect(2)
    ready, bare = maker.made
    assert pool.take(_with("code")) is ready
    await maker.expect(1)  # another bare one, when the code is in the first
    assert [each.source for each in bare.provided] == ["code"]
    assert pool.take(_with("code")) is bare
    await pool.close()


async def test_what_has_replaced_code_in_it_is_ended() -> None:
    maker = _Maker()
    pool = Pool(maker, 1)
    pool.take(_with("old"))
    await maker.expect(1)
    pool.retire("acme.dev", "new")
    await asyncio.wait_for(maker.made[0].stopped.wait(), 60)
    await maker.expect(1)  # a bare one
    assert pool.take(_with("new")) is maker.made[1]
    assert maker.made[1].provided == []
    await pool.close()


async def test_a_machine_that_the_code_cannot_be_put_into_is_ended() -> None:
    maker = _Maker()
    pool = Pool(maker, 1)
    pool.take(_with("broken"))
    await maker.expect(1)
    await asyncio.wait_for(maker.made[0].stopped.wait(), 60)
    assert len(pool) == 0
    await pool.close()


async def test_one_that_has_died_is_nobodys() -> None:
    maker = _Maker()
    pool = Pool(maker, 1)
    pool.take(_spec("a"))
    await maker.expect(1)
    maker.made[0].lost = True
    assert pool.take(_spec("a")) is None
    await maker.expect(1)
    assert pool.take(_spec("a")) is maker.made[1]
    await pool.close()
    assert maker.made[0].stopped.is_set()


async def test_a_kind_that_cannot_be_made_is_left_alone_until_it_is_wanted_again() -> None:
    maker = _Maker()
    maker.broken = {"a"}
    pool = Pool(maker, 2)
    pool.take(_spec("a"))
    pool.take(_spec("b"))
    await maker.expect(2)
    assert [each.spec.image for each in maker.made] == ["b"]
    maker.broken = set()
    pool.take(_spec("a"))
    await maker.expect(1)
    assert [each.spec.image for each in maker.made] == ["b", "a"]
    await pool.close()


async def test_no_budget_no_pool() -> None:
    maker = _Maker()
    pool = Pool(maker, 0)
    assert pool.take(_spec("a")) is None
    await pool.close()
    assert maker.made == []


async def test_none_is_started_while_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()

    def short() -> bool:
        looked.set()
        return True

    monkeypatch.setattr("worker.pool.memory_is_short", short)
    maker = _Maker()
    pool = Pool(maker, 1)
    pool.take(_spec("a"))
    await asyncio.wait_for(looked.wait(), 60)
    await pool.close()
    assert maker.made == []
