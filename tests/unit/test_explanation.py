"""What ``helmr run explain`` says in every situation a run can be in."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from bus.explanation import Situation, explain
from bus.presence import WorkerInfo
from helmr.events import Limit
from helmr.explanation import Explanation
from helmr.models import QueueHolder
from helmr.reducers import run as rules
from helmr.reducers.queue import Limits
from tests.lives import START, Life


def worker(**changes: Any) -> WorkerInfo:
    fixed: dict[str, Any] = {
        "id": "wrk_1",
        "host": "host_1",
        "group": "default",
        "engine": "docker",
        "isolated": True,
        "slots": 4,
        "running": 4,
        "started_at": START,
        "version": "1",
    }
    return WorkerInfo(**fixed | changes)


def about(life: Life, *, after: float = 200.0, **facts: Any) -> Explanation:
    """The explanation ``after`` seconds after the run's latest event."""
    kinds = {"lost": "lease_lost", "retry": "retry_scheduled", "started": "started", "cancel": "cancel_requested"}
    latest = {event.kind: event for event in life.events}
    found = {name: latest.get(kind) for name, kind in kinds.items()}
    now = life.at + timedelta(seconds=after)
    told = explain(Situation(**{"now": now, "run": life.record, "last": life.events[-1], **found, **facts}))
    assert (told.run_id, told.status) == (life.id, life.record.status)
    assert told.text.startswith(f"{life.id} ")
    assert told.text.endswith((".", "follows."))
    assert ".." not in told.text
    assert "  " not in told.text
    return told


def held(limit: Limit, **spec: Any) -> Life:
    life = Life(**spec)
    draft = rules.create(life.spec, cause="start", lane=spec.pop("lane", "default"), limit=limit)
    return life.add("held", draft.data)


def holder(run_id: str, key: str | None = "acme") -> QueueHolder:
    return QueueHolder(run_id=run_id, concurrency_key=key, status="running", since=START, worker="wrk_1")


class TestHeld:
    """Runs that are not let in yet."""

    def test_the_limit_the_holders_and_the_position(self) -> None:
        life = held("queue", queue="reviews", concurrency_key="acme")
        told = about(
            life,
            limits=Limits(per_key=4, keyless=4),
            full=True,
            holders=[holder(f"run_{n}") for n in range(5)],
            ahead=3,
        )
        assert told.state == "held_by_queue"
        assert told.since == life.at
        assert (
            "held since 12:00:01 UTC (3m 20s) by the limit of queue reviews: 4 at once of each concurrency key"
            in told.text
        )
        assert "The slots of concurrency key acme are with run_0 (running, 3m 21s), run_1" in told.text
        assert "and 2 more" in told.text
        assert "3 runs are admitted before it." in told.text
        assert "admitted when one of these ends or waits" in told.text
        assert told.facts["ahead"] == 3
        assert len(told.facts["holders"]) == 5

    @pytest.mark.parametrize(
        ("limits", "key", "words"),
        [
            (Limits(total=8, per_key=2), "acme", ("8 at once, 2 of each concurrency key", "The slots of the queue")),
            (
                Limits(per_key=1, keyless=1),
                None,
                ("1 at once of each concurrency key", "the runs without a concurrency key"),
            ),
        ],
    )
    def test_whose_slots_they_are(self, limits: Limits, key: str | None, words: tuple[str, ...]) -> None:
        life = held("queue", queue="reviews", concurrency_key=key)
        told = about(life, limits=limits, full=True, holders=[holder("run_0", key)])
        assert all(each in told.text for each in words)

    @pytest.mark.parametrize(("ahead", "words"), [(0, "the next in turn"), (1, "One run is"), (9, "9 runs are")])
    def test_a_backlog(self, ahead: int, words: str) -> None:
        told = about(held("backlog"), lane_waiting=64, lane_most=64, ahead=ahead, workers=[worker()])
        assert told.state == "held_by_backlog"
        assert "64 runs wait for a worker of group default already" in told.text
        assert "There is one worker for it, with 4 of 4 slots busy" in told.text
        assert words in told.text

    def test_one_that_has_room_is_about_to_be_let_in(self) -> None:
        told = about(held("queue", queue="q"), lane_waiting=0, lane_most=64)
        assert "admitted at once" in told.text

    def test_when_it_expires(self) -> None:
        told = about(held("backlog", ttl=600.0), after=10, lane_waiting=64, lane_most=64)
        assert "Unless a worker takes it by 12:10:01 UTC, it expires." in told.text
        assert told.facts["expires_at"] == START + timedelta(seconds=601)


class TestQueued:
    """Runs in a lane."""

    def test_busy_workers(self) -> None:
        told = about(Life().queued(), workers=[worker(), worker(id="wrk_2", running=3)], before=7)
        assert told.state == "queued"
        assert "There are 2 workers for it, with 7 of 8 slots busy" in told.text
        assert "7 runs are taken before it." in told.text

    @pytest.mark.parametrize(
        ("lane", "words"),
        [
            ("default", "start one with `helmr worker`"),
            ("gpu", "start one with `helmr worker --group gpu`"),
            ("~host_9", "No worker runs on host host_9, which has its workspace's files"),
            ("@wrk_9", "That worker is gone; the run is moved"),
        ],
    )
    def test_nobody_to_take_it(self, lane: str, words: str) -> None:
        told = about(Life().queued(lane=lane))
        assert told.state == "no_worker"
        assert words in told.text

    def test_after_which_loss_it_was_dispatched_again(self) -> None:
        life = Life().queued().leased("wrk_9").add("lease_lost", {"worker": "wrk_9", "reason": "worker wrk_9 was lost"})
        lost = about(life)
        assert lost.state == "lost"
        assert "worker wrk_9 was lost at 12:00:04 UTC" in lost.text
        assert "dispatch 1 of attempt 1" in lost.text
        again = about(life.queued("redispatch"), workers=[worker()])
        assert "dispatched again after worker wrk_9 was lost" in again.text

    def test_when_it_is_retried(self) -> None:
        life = Life().queued().leased()
        due = life.at + timedelta(seconds=31)
        life.add(
            "retry_scheduled",
            {"attempt": 2, "at": due.isoformat(), "failure": {"code": "task_error", "message": "no\nx"}},
        )
        told = about(life, after=10)
        assert told.state == "retrying"
        assert "attempt 1 failed at 12:00:04 UTC with task_error: no." in told.text
        assert "Attempt 2 is queued at 12:00:34 UTC, in 20.0s." in told.text
        assert "queued at 12:00:34 UTC, now." in about(life, after=100).text

    def test_one_that_was_just_woken(self) -> None:
        life = Life().queued().leased().add("waiting", {"kind": "timer"}).add("wait_completed", {})
        assert about(life).state == "woken"


class TestRunning:
    """Runs that somebody executes."""

    def test_since_when_where_and_for_how_long_yet(self) -> None:
        told = about(Life().queued().leased(), after=60, holder=worker())
        assert told.state == "running"
        assert "on worker wrk_1 since 12:00:03 UTC (1m), attempt 1." in told.text
        assert "13m 59s left of its maximum duration of 15m" in told.text
        assert told.facts["seconds_left"] == 839.0

    def test_what_the_worker_prepares(self) -> None:
        life = Life().queued().add("leased", {"worker": "wrk_1"})
        told = about(life, holder=worker(), note="pulling python:3.12")
        assert told.state == "preparing"
        assert "prepares its workspace: pulling python:3.12." in told.text

    def test_an_earlier_start_does_not_count(self) -> None:
        life = Life().queued().leased().add("lease_lost", {"worker": "wrk_1", "reason": "gone"})
        told = about(life.queued("redispatch").add("leased", {"worker": "wrk_1"}), holder=worker())
        assert told.state == "preparing"

    @pytest.mark.parametrize(("force", "words"), [(False, "--force` does not wait"), (True, "is being killed")])
    def test_that_its_end_was_asked_for(self, force: bool, words: str) -> None:
        life = Life().queued().leased().add("cancel_requested", {"reason": "enough", "force": force})
        told = about(life, holder=worker())
        assert told.state == "cancelling"
        assert "being cancelled since 12:00:04 UTC (3m 20s) (enough)" in told.text
        assert words in told.text

    def test_that_its_worker_is_silent(self) -> None:
        told = about(Life().queued().leased())
        assert told.state == "silent"
        assert "of which nothing is heard any more" in told.text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"kind": "stream", "stream": "approval", "correlation_id": "pr-1"},
            ("input stream approval with correlation id pr-1", "`helmr session input send "),
        ),
        (
            {"kind": "token", "token": "tok_1", "due": "2026-03-01T13:00:00Z"},
            ("for token tok_1", "until 13:00:00 UTC (in 56m"),
        ),
        (
            {"kind": "timer", "due": "2026-03-03T12:00:00Z"},
            ("for a timer", "until 2026-03-03 12:00:00 UTC (in 1d 23h)"),
        ),
    ],
)
def test_what_a_run_waits_for(data: dict[str, Any], words: tuple[str, ...]) -> None:
    told = about(Life().queued().leased().add("waiting", data))
    assert (told.state, told.facts["kind"]) == ("waiting", data["kind"])
    assert "it holds no slot meanwhile" in told.text
    assert all(each in told.text for each in words)


class TestEnded:
    """Runs that are over."""

    def test_success(self) -> None:
        told = about(Life().queued().leased().succeeds())
        assert told.state == "succeeded"
        assert "succeeded after running for 2.0s. That was at 12:00:04 UTC (3m 20s ago); nothing follows." in told.text

    @pytest.mark.parametrize("code", ["task_error", "out_of_memory", "dispatch_exhausted", "image_error", "unheard_of"])
    def test_failure_and_what_to_do(self, code: str) -> None:
        life = Life().queued().leased().fails(code if code != "unheard_of" else "task_exit", "it broke.")
        told = about(life)
        assert told.state == "failed"
        assert "it broke. What to do: " in told.text
        assert "{id}" not in told.text
        assert told.facts["failure"]["message"] == "it broke."

    def test_a_later_attempt(self) -> None:
        assert "It was attempt 2." in about(Life().queued().leased().retries().fails()).text

    def test_cancel_and_expiry(self) -> None:
        assert "was cancelled." in about(Life().queued().add("cancelled", {"reason": None})).text
        expired = about(Life(ttl=60.0).queued().add("expired", {"ttl": 60.0}))
        assert "no worker had taken it within its time to live of 1m" in expired.text


def test_a_full_disk_is_what_keeps_a_run_waiting() -> None:
    told = about(Life().queued(), workers=[worker(full=True, running=0)])
    assert "disk of its machine is almost full" in told.text
    assert told.facts["disk_full"] == ["wrk_1"]
    told = about(Life().queued(), workers=[worker(full=True, running=0), worker(id="wrk_2", running=0)])
    assert "almost full" not in told.text


def test_an_engine_that_is_away_is_what_keeps_a_run_waiting() -> None:
    away = worker(engine_problem="no Docker engine answers", running=0)
    told = about(Life().queued(), workers=[away, worker(id="wrk_2", full=True, running=0)])
    assert "wrk_1: no Docker engine answers; wrk_2: its disk is almost full" in told.text
    assert told.facts["engine_problems"] == {"wrk_1": "no Docker engine answers"}
    told = about(Life().queued(), workers=[away, worker(id="wrk_3", running=0)])
    assert "no Docker engine" not in told.text
