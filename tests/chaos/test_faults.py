"""The plans of faults: made from the seed alone, and within what was asked for."""

from __future__ import annotations

import random

import pytest

from tests.chaos.faults import KINDS, Fault, parse, plan


def test_a_seed_is_one_plan() -> None:
    first, again, other = (plan(random.Random(seed), seconds=300) for seed in (1, 1, 2))
    assert first == again != other
    assert {fault.kind for fault in first} == set(KINDS)
    assert [fault.at for fault in first] == sorted(fault.at for fault in first)
    assert all(3 <= fault.at < 300 for fault in first)


def test_only_the_kinds_that_were_asked_for() -> None:
    assert {fault.kind for fault in plan(random.Random(1), seconds=100, kinds=("kill", "cut"))} == {"kill", "cut"}
    assert plan(random.Random(1), seconds=100, kinds=()) == []


def test_containers_and_their_engine_are_hit_where_there_are_any() -> None:
    def targets(engine: str) -> set[tuple[str, str]]:
        found = (fault for seed in range(9) for fault in plan(random.Random(seed), seconds=300, engine=engine))
        return {(fault.kind, fault.target) for fault in found}

    more = {("kill", "init"), ("kill", "engine"), ("kill", "containerd"), ("pause", "machine"), ("pause", "engine")}
    assert targets("docker") - targets("process") == more | {(kind, "engine") for kind in ("cut", "hold", "delay")}


def test_the_server_is_never_away_for_long() -> None:
    found = [fault for seed in range(50) for fault in plan(random.Random(seed), seconds=100) if fault.target == "nats"]
    assert found
    assert max(fault.lasts for fault in found) <= 3


def test_a_fault_can_be_written_down() -> None:
    assert parse("3 pause worker-1 9.5") == Fault(at=3, kind="pause", target="worker-1", lasts=9.5)
    assert parse("0.5 kill nats") == Fault(at=0.5, kind="kill", target="nats")


@pytest.mark.parametrize(
    "text", ["3 pause", "3 hug worker-1", "3 kill worker-9", "soon kill nats", "3 cut client long"]
)
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(text)
