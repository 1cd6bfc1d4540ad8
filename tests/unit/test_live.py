"""The live runs are what the whole log says of those that have not ended."""

from __future__ import annotations

import random

import pytest

from bus.live import FILTERS, LiveRun, LiveRuns
from bus.live_follower import checkpoint
from helmr import subjects
from helmr.events import TERMINAL, Draft
from helmr.reducers import run as rules
from helmr.reducers import run_fold
from helmr.subjects import Scope
from tests.lives import Life, lives


def followed(subject: str) -> bool:
    """Whether the server would deliver it."""
    tokens = subject.split(".")

    def matches(pattern: str) -> bool:
        wanted = pattern.split(".")
        return len(wanted) == len(tokens) and all(w in {"*", t} for w, t in zip(wanted, tokens, strict=True))

    return any(matches(pattern) for pattern in FILTERS)


def interleaved(told: list[Life], seed: int = 1) -> list[tuple[int, str, bytes]]:
    """The events of several runs, mixed, each run's in order; those that are followed."""
    chance = random.Random(seed)  # noqa: S311  # a mixture that can be had again
    left = [life.published() for life in told]
    stream = []
    while any(left):
        stream.append(chance.choice([events for events in left if events]).pop(0))
    return [(seq, *message) for seq, message in enumerate(stream, start=1) if followed(message[0])]


def fold(stream: list[tuple[int, str, bytes]]) -> LiveRuns:
    runs = LiveRuns()
    for message in stream:
        runs.take(*message)
    return runs


def kind_of(run: LiveRun | None) -> str | None:
    return run.kind if run else None


def test_it_holds_the_runs_that_have_not_ended_with_their_states() -> None:
    told = lives(40)
    runs = fold(interleaved(told))
    alive = {life.id: life for life in told if life.state and not life.state.terminal}
    assert {run.id for run in runs} == set(alive)
    for run in runs:
        state = alive[run.id].state
        assert state is not None
        for name in ("status", "attempt", "dispatch", "lane", "lease", "wait", "queue", "priority", "created_at"):
            assert getattr(run.state, name) == getattr(state, name), name


def test_runs_are_counted_by_scope() -> None:
    held = Life(scope=Scope("acme", "prod"))
    held.add("held", rules.create(held.spec, cause="start", lane="default", limit="queue").data)
    waiting = Life().queued().leased().add("waiting", {"kind": "timer"})
    runs = fold(
        interleaved([held, waiting, Life().queued(), Life().queued().leased(), Life().queued().leased().succeeds()])
    )
    assert runs.count(Scope("acme", "prod")) == {"held": 1, "queued": 0, "running": 0, "waiting": 0}
    assert runs.count(Scope("acme", "dev")) == {"held": 0, "queued": 1, "running": 1, "waiting": 1}


def test_leases_are_found_by_worker() -> None:
    first, second = Life().queued().leased("wrk_1"), Life().queued().leased("wrk_2")
    lost = Life().queued().leased("wrk_1").add("lease_lost", {"worker": "wrk_1", "reason": "gone"})
    runs = fold(interleaved([first, second, lost, Life().queued(), Life().queued().leased("wrk_1").succeeds()]))
    assert {worker: {run.id for run in held} for worker, held in runs.leased().items()} == {
        "wrk_1": {first.id},
        "wrk_2": {second.id},
    }
    gone = runs.get(lost.id)
    assert gone is not None
    assert (gone.holder, gone.told.reason) == (None, "gone")


def test_listeners_hear_every_change_and_the_end() -> None:
    life = Life().queued().leased().add("metadata", {"metadata": {}}).succeeds()
    heard: list[tuple[str | None, str | None]] = []
    runs = LiveRuns()
    runs.listen(lambda *change: heard.append((kind_of(change[0]), kind_of(change[1]))))
    for message in interleaved([life]):
        runs.take(*message)
    assert heard == [(None, "queued"), ("queued", "leased"), ("leased", None)]
    assert len(runs) == 0


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\xff"])
def test_what_is_no_event_is_passed_over(body: bytes) -> None:
    life = Life().queued()
    runs = fold(interleaved([life]))
    runs.take(5, subjects.event(life.scope, "run", life.id, "leased"), body)
    runs.take(6, "helmr.ev.odd", body)
    assert [run.kind for run in runs] == ["queued"]
    assert runs.position == 6


def test_ends_of_unknown_runs_are_nothing() -> None:
    runs = LiveRuns()
    heard: list[LiveRun | None] = []
    runs.listen(lambda _, after: heard.append(after))
    for kind in TERMINAL:
        runs.take(7, subjects.event(Life().scope, "run", "run_1", kind), b"")
    assert (heard, len(runs), runs.position) == ([], 0, 7)


@pytest.mark.parametrize("most", [0, 3, 1000])
@pytest.mark.parametrize("at", [0, 1, 37, 90, 10_000])
def test_any_checkpoint_leads_to_the_same_runs(at: int, most: int) -> None:
    stream = interleaved(lives(48), seed=most)
    whole, early = fold(stream), fold(stream[:at])
    point = checkpoint(early, None, most=most)
    assert len(point.named) <= most
    named = [message for message in stream if message[0] in point.named]
    again = fold(named + [message for message in stream if message[0] > point.position])
    assert {run.id: run for run in again} == {run.id: run for run in whole}


def test_every_kind_of_event_that_changes_more_than_metadata_is_followed() -> None:
    state = Life().queued().leased().state
    assert state is not None
    for kind in ("started", "step", "output", "metadata", "token_created", "log"):
        draft = Draft(kind=kind, data={"metadata": {"a": 1}})
        after = run_fold.apply(state, kind, draft.data, state.created_at)
        assert after.status == state.status
        assert not followed(subjects.event(Life().scope, "run", "run_1", kind))
    assert followed(subjects.event(Life().scope, "run", "run_1", "queued", lane="@wrk_1", priority=-3))
