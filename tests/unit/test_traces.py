"""Spans of a run: one for each part of its life, the same however often it is told."""

from __future__ import annotations

import re

from bus.traces import MAX_SPAN_EVENTS, Span, spans
from helmr import trace_ids
from tests.lives import SCOPE, Life


def tree(found: list[Span]) -> list[tuple[str, str | None]]:
    """Names, each with that of its parent, in order."""
    names = {span.span_id: span.name for span in found}
    assert len(names) == len(found)
    return [(span.name, names[span.parent] if span.parent else None) for span in found]


def test_a_run_is_a_span_with_one_for_each_part_of_its_life() -> None:
    life = Life(task_id="review").queued().leased().waits().succeeds()
    found = spans(SCOPE, life.events)
    lease = [("lease", "run review"), ("prepare", "lease"), ("execute", "lease")]
    assert tree(found) == [
        ("run review", None),
        ("queue", "run review"),
        *lease,
        ("wait", "run review"),
        ("queue", "run review"),
        *lease,
    ]
    whole = found[0]
    assert (whole.begin, whole.end) == (life.events[0].at, life.events[-1].at)
    assert all(whole.begin <= span.begin <= span.end <= whole.end for span in found)
    assert whole.attributes["helmr.run.id"] == life.id
    assert whole.attributes["helmr.run.status"] == "succeeded"
    assert whole.error is None
    (wait,) = (span for span in found if span.name == "wait")
    assert wait.attributes["helmr.wait.outcome"] == "completed"
    assert wait.attributes["helmr.wait.stream"] == "approval"


def test_an_execution_that_goes_on_where_it_is_prepares_nothing() -> None:
    life = Life(task_id="review").queued().leased()
    life.add("waiting", {"kind": "timer"}).add("wait_completed", {}).queued("resume", "@wrk_1")
    life.add("leased", {"worker": "wrk_1", "attempt": 1, "dispatch_attempt": 2}).add("step", {"name": "s", "result": 1})
    found = spans(SCOPE, life.succeeds().events)
    assert tree(found)[-3:] == [("queue", "run review"), ("lease", "run review"), ("execute", "lease")]
    assert [event.name for event in found[-1].events] == ["step"]
    other = Life(task_id="review").queued().leased().waits()
    assert [span.name for span in spans(SCOPE, other.succeeds().events)].count("prepare") == 2


def test_what_went_wrong_is_told_where_it_did() -> None:
    life = Life().queued().leased().retries().fails("out_of_memory", "too much")
    found = spans(SCOPE, life.events)
    errors = [(span.name, span.error) for span in found if span.error]
    assert errors == [
        (f"run {life.spec.task_id}", "out_of_memory: too much"),
        ("lease", "task_error: again"),
        ("execute", "task_error: again"),
        ("lease", "out_of_memory: too much"),
        ("execute", "out_of_memory: too much"),
    ]
    assert [span.name for span in found].count("retry") == 1


def test_a_lost_lease_is_an_error_and_the_run_goes_on() -> None:
    life = Life().queued().leased().add("lease_lost", {"worker": "wrk_1", "reason": "gone"})
    life = life.queued("redispatch").leased("wrk_2").succeeds()
    leases = [span for span in spans(SCOPE, life.events) if span.name == "lease"]
    assert [(span.attributes["helmr.worker"], span.error) for span in leases] == [
        ("wrk_1", "lease lost: gone"),
        ("wrk_2", None),
    ]


def test_a_run_that_was_never_leased_has_only_waited() -> None:
    found = spans(SCOPE, Life().queued().add("cancelled", {"reason": "no need"}).events)
    assert [span.name for span in found][1:] == ["queue"]
    assert found[0].attributes["helmr.run.status"] == "cancelled"


def test_the_journal_becomes_events_of_the_execution_up_to_a_limit() -> None:
    life = Life().queued().leased()
    for at in range(MAX_SPAN_EVENTS + 10):
        life.add("step", {"name": f"s{at}", "result": at})
    (execution,) = (span for span in spans(SCOPE, life.succeeds().events) if span.name == "execute")
    assert len(execution.events) == MAX_SPAN_EVENTS
    assert (execution.events[0].name, execution.events[0].attributes) == ("step", {"helmr.name": "s0"})


def test_telling_twice_tells_the_same_and_other_runs_tell_other_spans() -> None:
    life = Life().queued().leased().succeeds()
    assert spans(SCOPE, life.events) == spans(SCOPE, life.events)
    other = Life().queued().leased().succeeds()
    ids = [{span.span_id for span in spans(SCOPE, each.events)} for each in (life, other)]
    assert not ids[0] & ids[1]


def test_the_tasks_own_spans_hang_below_the_execution() -> None:
    life = Life().queued().leased().succeeds()
    lease = next(event.cursor for event in life.events if event.kind == "leased")
    (execution,) = (span for span in spans(SCOPE, life.events) if span.name == "execute")
    parent = trace_ids.traceparent(life.id, lease)
    match = re.fullmatch(r"00-([0-9a-f]{32})-([0-9a-f]{16})-01", parent)
    assert match is not None
    assert int(match[1], 16) == trace_ids.trace_id(life.id)
    assert int(match[2], 16) == execution.span_id
