"""The checker against histories made up for it: it is silent about good ones, and each way to be wrong is noticed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest

from bus.log import TOKEN
from helmr import chunks, ids, subjects
from helmr.events import TERMINAL, Draft, Grant, QueueEvent, QueueState, RunEvent, TokenEvent
from helmr.models import StreamRecord
from helmr.reducers import queue as queue_rules
from helmr.reducers.queue import limits
from tests.chaos.checker import check
from tests.chaos.evidence import Answer, Evidence, Mark, Start, Stored
from tests.chaos.lines import expected
from tests.chaos.part_process import WRITER
from tests.lives import SCOPE, Life

Told = list[tuple[RunEvent, str | None]]
_UNSIGNED = {"queued", "held", "leased", "lease_lost", "cancel_requested", "expired"}


def _told(life: Life) -> Told:
    """The events of a life, each with the lease its writer claims to hold."""
    holder: str | None = None
    found: Told = []
    for event in life.events:
        if event.kind == "leased":
            holder = f"{event.data['worker']}@{event.cursor}"
        found.append((event, None if event.kind in _UNSIGNED else holder))
    return found


def _messages(told: Told) -> tuple[Stored, ...]:
    return tuple(
        Stored(
            seq=seq,
            subject=subjects.event(SCOPE, "run", event.run_id, event.kind, lane=event.data.get("lane", "")),
            at=event.at,
            headers={WRITER: writer} if writer else {},
            data=msgspec.json.encode(event),
        )
        for seq, (event, writer) in enumerate(told, 1)
    )


def _chunk(life: Life, data: bytes, *, offset: int = 0, dispatch: int = 1, tombstone: str | None = None) -> Stored:
    stream = "log" if tombstone else "stdout"
    headers = chunks.headers(offset=offset, dispatch=dispatch, at=life.at, tombstone=tombstone)
    return Stored(seq=1, subject=subjects.log(SCOPE, life.id, 1, stream), at=life.at, headers=headers, data=data)


def _marks(life: Life, *spans: tuple[float, float], key: str = "one") -> tuple[Mark, ...]:
    """Start and end of executions, in seconds after the first event."""
    begin = life.events[0].at.timestamp()
    return tuple(
        Mark(what=what, run=life.id, attempt=1, key=f"{key}-{number}", pid=number, where="/w", at=begin + at, mono=at)
        for number, span in enumerate(spans, 1)
        for what, at in zip(("daemon", "daemon") if key == "daemon" else ("start", "end"), span, strict=True)
    )


def _start(life: Life, **changes: Any) -> Start:
    fixed = {"kind": "noop", "n": 7, "outcomes": frozenset({"succeeded"}), "width": 60}
    return Start(**{**fixed, "run_id": life.id, "session_id": life.spec.session_id, **changes})


def _ended(life: Life, size: int) -> Life:
    logs = {"stdout": size, "stderr": 0, "log": 0, "truncated": False}
    return life.add("succeeded", {"output": {"n": 7}, "exit_code": 0, "logs": logs})


def _good() -> tuple[Life, Evidence]:
    """A run whose first worker was lost, and what a Helmr without fault leaves of it."""
    life = Life().queued().leased("wrk_1").add("lease_lost", {"worker": "wrk_1", "reason": "lost"}).queued("redispatch")
    life.add("leased", {"worker": "wrk_2", "attempt": 1, "dispatch_attempt": 2}).add("started")
    text = expected(life.id, 1, 300, 60)
    _ended(life, len(text))
    evidence = Evidence(
        runs=_messages(_told(life)),
        logs=(
            _chunk(life, text[:100]),
            _chunk(life, b"", tombstone=chunks.WORKER_LOST),
            _chunk(life, text[:200], dispatch=2),
            _chunk(life, text[200:], offset=200, dispatch=2),
        ),
        marks=_marks(life, (2.0, 2.8), (5.0, 5.9)),
        starts=(_start(life),),
    )
    return life, evidence


def _broken(evidence: Evidence) -> set[str]:
    return {violation.rule for violation in check(evidence)}


def _with_runs(told: Told) -> Callable[[Evidence], Evidence]:
    return lambda evidence: msgspec.structs.replace(evidence, runs=_messages(told))


def _replaced(evidence: Evidence, **changes: Any) -> Evidence:
    return msgspec.structs.replace(evidence, **changes)


def test_a_good_history_breaks_no_rule() -> None:
    _, evidence = _good()
    assert check(evidence) == []


def test_an_acknowledged_start_that_is_not_in_the_log() -> None:
    life, evidence = _good()
    assert _broken(_replaced(evidence, starts=(_start(life, run_id="run_gone"),))) == {"every acknowledged start ends"}


def test_a_run_that_never_ends() -> None:
    life, evidence = _good()
    told = _told(life)[:-1]
    assert _broken(_replaced(evidence, runs=_messages(told))) == {"every acknowledged start ends"}


def test_an_event_after_the_end() -> None:
    life, evidence = _good()
    told = _told(life)
    late = msgspec.structs.replace(told[-1][0], cursor=told[-1][0].cursor + 1, id="evt_late")
    assert _broken(_replaced(evidence, runs=_messages([*told, (late, told[-1][1])]))) >= {
        "a history is what the reducer allows",
        "one end and nothing after it",
    }


def test_an_event_appended_to_another_past() -> None:
    life, evidence = _good()
    told = _told(life)
    zombie = msgspec.structs.replace(told[2][0], kind="output", id="evt_zombie", data={})
    told.insert(5, (zombie, told[2][1]))
    assert _broken(_replaced(evidence, runs=_messages(told))) >= {
        "a history is what the reducer allows",
        "only the holder writes",
    }


def test_a_fenced_holder_that_is_heard() -> None:
    life, evidence = _good()
    told = [(event, "wrk_1@2" if event.kind == "succeeded" else writer) for event, writer in _told(life)]
    assert _broken(_replaced(evidence, runs=_messages(told))) == {"only the holder writes"}


def test_two_leases_at_a_time() -> None:
    life, evidence = _good()
    told = [pair for pair in _told(life) if pair[0].kind != "lease_lost"]
    assert "only the holder writes" in _broken(_replaced(evidence, runs=_messages(told)))


@pytest.mark.parametrize("numbers", [(2, 2), (1, 1), (1, 3)])
def test_attempts_that_count_wrongly(numbers: tuple[int, int]) -> None:
    _, evidence = _good()
    other = (
        Life().queued().leased("wrk_1").add("lease_lost", {"worker": "wrk_1", "reason": "lost"}).queued("redispatch")
    )
    other.add("leased", {"worker": "wrk_2", "attempt": numbers[0], "dispatch_attempt": numbers[1]}).add("started")
    _ended(other, 0)
    evidence = _replaced(evidence, runs=_messages(_told(other)), starts=(), logs=(), marks=_marks(other, (6.0, 6.5)))
    assert "attempts rise by retry alone" in _broken(evidence)


def test_a_retry_raises_the_attempt() -> None:
    life = Life().queued().leased().retries()
    _ended(life, 0)
    evidence = Evidence(runs=_messages(_told(life)), marks=_marks(life, (6.0, 6.5)))
    assert "attempts rise by retry alone" not in _broken(evidence)


@pytest.mark.parametrize(
    ("changes", "fine"),
    [({}, True), ({"n": 8}, False), ({"outcomes": frozenset({"task_error"})}, False)],
)
def test_an_end_that_is_not_that_of_the_task(changes: dict[str, Any], *, fine: bool) -> None:
    life, evidence = _good()
    broken = _broken(_replaced(evidence, starts=(_start(life, **changes),)))
    assert broken == (set() if fine else {"it ends as its task does"})


def test_a_cancel_is_an_excuse_only_where_somebody_cancelled() -> None:
    life = Life().queued().add("cancelled", {"reason": None})
    evidence = Evidence(runs=_messages(_told(life)), starts=(_start(life),))
    assert _broken(evidence) == {"it ends as its task does"}
    assert _broken(_replaced(evidence, cancels=frozenset({life.id}))) == set()


def test_one_external_id_that_leads_to_two_runs() -> None:
    life, evidence = _good()
    same = (_start(life, external_id="x"), _start(life, external_id="x", reused=True))
    assert _broken(_replaced(evidence, starts=same)) == set()
    assert _broken(_replaced(evidence, starts=(same[0], same[0]))) == {"the same start is one run"}
    other = _start(life, external_id="x", reused=True, session_id="ses_other")
    assert _broken(_replaced(evidence, starts=(same[0], other))) == {"the same start is one run"}


def test_executions_that_overlap() -> None:
    life, evidence = _good()
    assert _broken(_replaced(evidence, marks=_marks(life, (2.0, 5.1), (5.0, 5.9)))) == {"executions do not overlap"}


def test_a_process_that_outlives_its_run() -> None:
    life, evidence = _good()
    end = (life.events[-1].at - life.events[0].at).total_seconds()
    late = _marks(life, (5.0, end + 0.1), key="daemon")
    assert _broken(_replaced(evidence, marks=(*evidence.marks, *late))) == {"nothing lives after its end"}


def test_a_step_that_is_taken_though_it_is_recorded() -> None:
    life = Life().queued().leased().add("step", {"name": "effect", "result": None})
    _ended(life, 0)
    recorded = (life.events[-2].at - life.events[0].at).total_seconds()

    def taken(after: float) -> Evidence:
        mark = msgspec.structs.replace(_marks(life, (recorded + after, 0.0))[0], what="step")
        return Evidence(runs=_messages(_told(life)), marks=(*_marks(life, (2.0, 3.5)), mark))

    assert _broken(taken(-0.1)) == set()
    assert _broken(taken(0.1)) == {"a recorded step is not taken again"}


def test_a_success_that_nobody_executed() -> None:
    _, evidence = _good()
    assert _broken(_replaced(evidence, marks=(evidence.marks[0], evidence.marks[2]))) == {"success was executed"}


def _limited(*lives: Life, granted: bool = True) -> Evidence:
    """Runs of the queue ``narrow``; ``granted``: the queue gave each its slot as soon as it was held."""
    events = sorted((pair for life in lives for pair in _told(life)), key=lambda pair: pair[0].at)
    messages: list[Stored] = []
    queue: QueueState | None = None
    for message, (event, _) in zip(_messages(events), events, strict=True):
        messages.append(message)
        change: dict[str, Any] = {"released": {event.run_id: 1}} if event.kind in TERMINAL else {}
        if event.kind == "held":
            grant = Grant(held=event.cursor, seq=1, key=event.data["key"], at=event.at)
            change = {"admitted": {event.run_id: msgspec.to_builtins(grant)}}
        if change and granted:
            queue = queue_rules.apply(queue, "admitted", change, event.at, queue_id="narrow")
            told = QueueEvent(
                cursor=1, id="evt_1", queue_id="narrow", kind="admitted", at=event.at, data=change, state=queue
            )
            subject = subjects.event(SCOPE, "queue", "narrow", "admitted")
            messages.append(Stored(seq=0, subject=subject, at=event.at, data=msgspec.json.encode(told)))
    ordered = [msgspec.structs.replace(message, seq=seq) for seq, message in enumerate(messages, 1)]
    marks = tuple(mark for life in lives for mark in _marks(life, (2.5, 2.6)))
    return Evidence(runs=tuple(ordered), marks=marks, limits={"narrow": limits(1, None)})


def _in_queue(start: datetime, key: str | None = None) -> Life:
    life = Life(start=start, queue="narrow", concurrency_key=key)
    spec = msgspec.to_builtins(life.spec)
    life.add("held", {"cause": "start", "lane": "default", "limit": "queue", "key": key, "spec": spec})
    return _ended(life.queued().leased(), 0)


def test_more_runs_at_once_than_the_queue_allows() -> None:
    first = _in_queue(Life().at)
    assert _broken(_limited(first, _in_queue(first.at + timedelta(seconds=1)))) == set()
    overlapping = _in_queue(first.at - timedelta(seconds=4))
    assert _broken(_limited(first, overlapping)) == {"limits hold"}
    assert _broken(_limited(first, _in_queue(first.at - timedelta(seconds=4), key="other"))) == set()


def test_a_run_that_nobody_gave_a_slot() -> None:
    assert _broken(_limited(_in_queue(Life().at), granted=False)) == {"a slot is granted"}


@pytest.mark.parametrize(("prefix", "after", "fine"), [("due", 0.5, True), ("due", 2.0, False), ("timer", -1.0, False)])
def test_a_timer_that_outlives_the_lease(prefix: str, after: float, *, fine: bool) -> None:
    life, evidence = _good()
    leased = next(event for event in life.events if event.kind == "leased")
    subject = f"helmr.{prefix}.{SCOPE}.run.{life.id}.ttl"
    message = Stored(seq=99, subject=subject, at=leased.at + timedelta(seconds=after))
    broken = _broken(_replaced(evidence, runs=(*evidence.runs, message)))
    assert broken == (set() if fine else {"a leased run has no time to live"})


def test_logs_with_a_gap_or_other_bytes_or_without_an_end() -> None:
    life, evidence = _good()
    first, grave, second, third = evidence.logs
    for logs in (
        (first, grave, third),
        (first, grave, second),
        (first, second, third),
        (first, grave, second, _chunk(life, b"?" * 100, offset=200, dispatch=2)),
        (first, grave, second, third, _chunk(life, b"?" * 100, offset=200, dispatch=2)),
    ):
        assert _broken(_replaced(evidence, logs=logs)) == {"logs are whole"}
    assert _broken(_replaced(evidence, logs=(third, second, third, grave, first))) == set(), (
        "order and repeats are fine"
    )


def test_records_that_are_lost_or_doubled() -> None:
    life, evidence = _good()

    def record(sequence: int, number: int) -> Stored:
        body = StreamRecord(
            id=f"rec_{sequence}",
            session_id=life.spec.session_id,
            stream="records",
            direction="out",
            sequence=sequence,
            data={"number": number},
            run_id=life.id,
            at=life.at,
        )
        subject = subjects.io(SCOPE, life.spec.session_id, "out", "records")
        return Stored(seq=sequence, subject=subject, at=life.at, data=msgspec.json.encode(body))

    assert _broken(_replaced(evidence, records=(record(1, 0), record(2, 1)))) == set()
    assert _broken(_replaced(evidence, records=(record(1, 0), record(3, 1)))) == {"records are whole"}
    assert _broken(_replaced(evidence, records=(record(1, 0), record(2, 0)))) == {"records are whole"}
    assert _broken(_replaced(evidence, records=(record(1, 1),))) == {"records are whole"}


def test_what_was_found_beside_the_log_is_reported() -> None:
    _, evidence = _good()
    assert _broken(_replaced(evidence, differences=("runs: 1 rows missing",))) == {"the history is the fold"}
    assert _broken(_replaced(evidence, leaks=("process 7",))) == {"nothing is left"}
    assert _broken(_replaced(evidence, crashes=("worker-1: ended",))) == {"parts end when told"}


def test_a_workspace_that_was_appended_to_another_past() -> None:
    from tests import lives

    life, evidence = _good()
    published = lives.workspace(life, live=True)
    stored = [
        Stored(seq=90 + seq, subject=subject, at=life.at, data=data) for seq, (subject, data) in enumerate(published)
    ]
    assert _broken(_replaced(evidence, runs=(*evidence.runs, *stored))) == set()
    assert _broken(_replaced(evidence, runs=(*evidence.runs, stored[1]))) == {"other entities follow their rules"}


TOKEN_ID = ids.new("tok")


def _token(*answers: str) -> tuple[Stored, ...]:
    """What a log would have of a token that was completed so often."""
    life = Life()
    state = TOKEN.fold(
        None, Draft(kind="created", data={"expires_at": life.at + timedelta(seconds=60)}), life.at, TOKEN_ID
    )
    events = [
        TokenEvent(
            cursor=2,
            id=f"evt_{answer}",
            token_id=TOKEN_ID,
            kind="completed",
            at=life.at + timedelta(seconds=2),
            data={"data": answer},
            state=state,
        )
        for answer in answers
    ]
    subject = subjects.event(SCOPE, "token", TOKEN_ID, "completed")
    return tuple(Stored(seq=0, subject=subject, at=each.at, data=msgspec.json.encode(each)) for each in events)


def _waits_for_token(kind: str, answer: str | None) -> Life:
    life = Life(payload={"token": TOKEN_ID}).queued().leased().add("waiting", {"kind": "token", "token": TOKEN_ID})
    life.add(kind, {"kind": "token"}, after=10.0).queued("resume").leased()
    logs = {"stdout": 0, "stderr": 0, "log": 0, "truncated": False}
    return life.add("succeeded", {"output": {"n": 7, "answer": answer}, "exit_code": 0, "logs": logs})


@pytest.mark.parametrize(
    ("completed", "kind", "heard", "told", "broken"),
    [
        (["yes"], "wait_completed", "yes", ["yes"], False),
        ([], "wait_timed_out", None, [], False),
        (["yes", "no"], "wait_completed", "yes", ["yes"], True),
        (["yes"], "wait_completed", "no", ["yes"], True),
        (["yes"], "wait_completed", "yes", ["yes", "no"], True),
        (["yes"], "wait_timed_out", None, ["yes"], True),
    ],
)
def test_a_token_has_one_answer(
    completed: list[str], kind: str, heard: str | None, told: list[str], broken: bool
) -> None:
    life = _waits_for_token(kind, heard)
    evidence = Evidence(
        runs=(*_messages(_told(life)), *_token(*completed)),
        starts=(_start(life, kind="waits-for-token"),),
        answers=tuple(Answer(token=TOKEN_ID, data=data) for data in told),
    )
    assert ("a token has one answer" in _broken(evidence)) == broken
