"""What ``helmr top`` shows, whatever order lists and events come in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from bus.live import LiveRuns
from bus.services.live import _record
from cli.board import Board, LiveEvent, Snapshot
from helmr.models import LiveRun, Queue
from tests.lives import Life

BEGAN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def live(life: Life, at: int = -1) -> LiveEvent:
    """An event of a run, as it comes live."""
    return msgspec.json.decode(msgspec.json.encode(life.events[at]), type=LiveEvent)


def started(**spec: Any) -> Life:
    """A run that was started when the board began."""
    return Life(start=BEGAN, **spec).queued()


def listed(life: Life) -> LiveRun:
    """The run as control lists it."""
    known = LiveRuns()
    subject, body = life.published()[-1]
    known.take(1, subject, body)
    (run,) = known
    return _record(run)


def shown(board: Board, *, after: float = 30.0) -> Snapshot:
    """The board so many seconds after it began."""
    return board.snapshot(BEGAN + timedelta(seconds=after))


def test_a_run_is_followed_from_its_start_to_its_end() -> None:
    board, life = Board(BEGAN), started()
    for kinds, totals in (
        ((), {"held": 0, "queued": 1, "running": 0, "waiting": 0}),
        (("leased", "started"), {"held": 0, "queued": 0, "running": 1, "waiting": 0}),
    ):
        if kinds:
            life.leased()
        for at in range(len(life.events)):
            board.take(live(life, at))
        assert shown(board).totals == totals
    (line,) = shown(board).running
    assert (line.id, line.worker, line.attempt) == (life.id, "wrk_1", 1)
    board.take(live(life.succeeds()))
    after = shown(board)
    assert sum(after.totals.values()) == 0
    assert [(run.id, run.status) for run in after.recent] == [(life.id, "succeeded")]
    assert (after.rates["started"], after.rates["succeeded"]) == (2.0, 2.0)  # one in half a minute
    assert shown(board, after=120).rates["succeeded"] == 0


def test_a_list_that_is_behind_brings_nothing_back() -> None:
    board, life = Board(BEGAN), started()
    running = listed(life.leased())
    board.take(live(life.succeeds()))
    board.begin([running])
    assert sum(shown(board).totals.values()) == 0


def test_an_event_that_is_behind_the_list_changes_nothing() -> None:
    board, life = Board(BEGAN), started()
    late = live(life)
    board.begin([listed(life.leased())])
    board.take(late)
    assert shown(board).totals["running"] == 1


def test_events_that_come_twice_count_once() -> None:
    board, life = Board(BEGAN), started()
    board.take(live(life))
    board.take(live(life))
    life.fails()
    board.take(live(life))
    board.take(live(life))
    assert len(shown(board).recent) == 1
    assert (shown(board).rates["started"], shown(board).rates["failed"]) == (2.0, 2.0)


def test_what_ended_while_nobody_heard_goes_with_the_next_list() -> None:
    board = Board(BEGAN)
    old = Life(start=BEGAN - timedelta(hours=1)).queued()
    new = started()
    board.begin([listed(old)])
    board.take(live(new))
    board.begin([])
    assert shown(board).totals["queued"] == 1  # a run younger than the board may be missing in a list


def test_a_list_tells_what_is_held_and_who_executes() -> None:
    board = Board(BEGAN)
    held = Life(start=BEGAN, queue="reviews")
    held.add("held", {"limit": "queue", "lane": "default", "cause": "start", "spec": msgspec.to_builtins(held.spec)})
    board.begin([listed(held), listed(started().leased("wrk_7"))], [queue("reviews", 3), queue("idle", None)])
    assert shown(board).totals == {"held": 1, "queued": 0, "running": 1, "waiting": 0}
    assert [run.worker for run in shown(board).running] == ["wrk_7"]
    lines = [(line.queue, line.limit, line.held) for line in shown(board).queues]
    assert lines == [("idle", None, 0), ("reviews", 3, 1), (None, None, 0)]


def queue(name: str, concurrency: int | None) -> Queue:
    """A queue that is declared, as control lists it."""
    return Queue(
        name=name,
        project="acme",
        environment="prod",
        declared=True,
        concurrency=concurrency,
        concurrency_per_key=None,
        in_use=0,
        waiting=0,
        oldest_waiting_at=None,
    )


def test_queues_tell_their_depth_and_their_oldest() -> None:
    board = Board(BEGAN)
    for life in (started(queue="reviews"), started(queue="reviews").leased(), started()):
        board.take(live(life))
    reviews, none = shown(board).queues
    assert (reviews.queue, reviews.queued, reviews.running) == ("reviews", 1, 1)
    assert 25 < reviews.oldest_seconds <= 30
    assert (none.queue, none.queued) == (None, 1)
