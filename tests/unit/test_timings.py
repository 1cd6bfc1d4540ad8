"""Where the time of a run went, as the worker measures it and as people are shown it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cli.timings import timings
from helmr.models import Event
from worker.stages import Stages

AT = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def _event(kind: str, seconds: float, *, attempt: int | None = 1, **data: Any) -> Event:
    return Event(
        cursor=int(seconds * 1000) + 1,
        id=f"evt_{kind}",
        run_id="run_1",
        kind=kind,
        at=AT + timedelta(seconds=seconds),
        attempt=attempt,
        dispatch_attempt=1,
        source="worker",
        message="",
        data=data,
    )


def test_steps_are_timed_one_after_the_other() -> None:
    now = iter((10.0, 10.5, 10.75, 11.0))
    stages = Stages(lambda: next(now))
    for name in ("claim", "container", "claim"):
        stages.over(name)
    assert stages.seconds() == {"claim": 0.75, "container": 0.25}


def test_a_run_is_cut_into_stages() -> None:
    events = [
        _event("held", 0, attempt=None),
        _event("queued", 2, attempt=None),
        _event("leased", 2.5),
        _event("started", 3, stages={"claim": 0.1, "container": 0.3}),
        _event("metadata", 3.1),
        _event("waiting", 4),
        _event("wait_completed", 10),
        _event("queued", 10.5),
        _event("leased", 11),
        _event("succeeded", 12),
    ]
    found = timings(events)
    assert [(each.stage, each.at, each.seconds) for each in found] == [
        ("held", 0, 2),
        ("queued", 2, 0.5),
        ("preparing", 2.5, 0.5),
        ("preparing.claim", 2.5, 0.1),
        ("preparing.container", 2.6, 0.3),
        ("running", 3, 1),
        ("waiting", 4, 6),
        ("woken", 10, 0.5),
        ("queued", 10.5, 0.5),
        ("running", 11, 1),
    ]
    assert [each.attempt for each in found[:3]] == [None, 1, 1]


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "retry_scheduled", "lease_lost", "waiting"])
@pytest.mark.parametrize(
    ("worker", "attempt", "stage"), [("wrk_1", 1, "running"), ("wrk_2", 1, "preparing"), ("wrk_1", 2, "preparing")]
)
def test_a_process_that_was_kept_runs_however_it_ends(end: str, worker: str, attempt: int, stage: str) -> None:
    events = [
        _event("leased", 0, worker="wrk_1"),
        _event("started", 1),
        _event("waiting", 2),
        _event("wait_completed", 3),
        _event("queued", 4),
        _event("leased", 5, worker=worker, attempt=attempt),
        _event(end, 6),
    ]
    assert [each.stage for each in timings(events)] == ["preparing", "running", "waiting", "woken", "queued", stage]


def test_a_process_that_another_worker_takes_over_goes_on_running() -> None:
    events = [
        _event("queued", 0, attempt=None),
        _event("leased", 1, worker="wrk_a"),
        _event("started", 2),
        _event("leased", 5, worker="wrk_b", execution=2),
        _event("succeeded", 7),
    ]
    assert [(each.stage, each.seconds) for each in timings(events)] == [
        ("queued", 1.0),
        ("preparing", 1.0),
        ("running", 3.0),
        ("running", 2.0),
    ]
    anew = [*events[:4], _event("started", 6), events[4]]  # it could not go on there: its code has begun anew
    assert [each.stage for each in timings(anew)][3:] == ["preparing", "running"]


def test_a_lease_that_ends_before_the_code_begins_has_only_prepared() -> None:
    assert [each.stage for each in timings([_event("leased", 0), _event("cancelled", 1)])] == ["preparing"]


def test_what_lasts_is_left_out() -> None:
    assert timings([]) == []
    assert timings([_event("queued", 0)]) == []
