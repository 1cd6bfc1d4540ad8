"""What a run has recorded, handed out again: in order on the main line, by name beside it."""

from __future__ import annotations

from typing import Any

import pytest

from helmr.errors import Nondeterminism
from helmr.events import RunEvent
from helmr.reducers.journal import recorded
from helmr.replay import Journal
from tests.unit.runs import START, running


def _entry(kind: str, name: str, n: int = 1, *, main: bool = True, **rest: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "n": n, "main": main, **rest}


def _event(what: str, /, *, attempt: int = 1, **data: Any) -> RunEvent:
    return RunEvent(
        cursor=1, id="evt_1", run_id="run_1", kind=what, at=START, attempt=attempt, data=data, state=running()
    )


class TestJournal:
    """Calls of the code that runs again."""

    def test_calls_get_what_is_recorded_in_order(self) -> None:
        first, second = _entry("step", "a", result=1), _entry("step", "a", 2, result=2)
        journal = Journal([first, second])
        assert journal.take("step", "a", main=True).entry == first
        assert journal.take("step", "a", main=True).entry == second
        assert not journal.replaying
        fresh = journal.take("step", "a", main=True)
        assert (fresh.entry, fresh.key) == (None, {"name": "a", "n": 3, "main": True})
        journal.finish()

    def test_another_call_is_refused_with_what_was_expected(self) -> None:
        journal = Journal([_entry("step", "a")])
        with pytest.raises(Nondeterminism, match="expected step 'a', call 1, found wait 'b', call 1"):
            journal.take("wait", "b", main=True)

    def test_an_early_end_is_refused(self) -> None:
        with pytest.raises(Nondeterminism, match="found the end of the task"):
            Journal([_entry("wait", "notes")]).finish()

    def test_calls_beside_the_main_line_come_in_any_order(self) -> None:
        journal = Journal([_entry("step", name, main=False, result=name) for name in "abc"])
        assert not journal.replaying
        assert [(journal.take("step", name, main=False).entry or {})["result"] for name in "cab"] == ["c", "a", "b"]
        assert journal.take("step", "d", main=False).entry is None
        journal.finish()

    def test_main_line_and_others_are_counted_apart(self) -> None:
        journal = Journal()
        assert [journal.take("step", "a", main=main).n for main in (True, False, True)] == [1, 1, 2]


class TestRecorded:
    """From events to entries."""

    def test_each_kind_of_call_is_recorded(self) -> None:
        events = [
            _event("started"),
            _event("step", call="step", name="a", n=1, main=True, result={"x": 1}),
            _event("step", call="now", name="", n=1, main=True, result="2026"),
            _event("output", stream="report", n=1, main=False, sequence=4, record_id="rec_1"),
            _event("output", stream="report", sequence=5, record_id="rec_2"),
            _event("token_created", name="", n=1, main=True, token="tok_1", expires_at="2027"),  # noqa: S106
            _event("metadata", metadata={"a": 1}, n=3),
            _event("waiting", kind="stream", name="notes", n=1, main=True, stream="notes"),
            _event("wait_completed", kind="stream", data="hello", sequence=1, seq=1),
        ]
        found = recorded(events, attempt=1)
        assert found.metadata_calls == 3
        assert [(e["kind"], e["name"], e["n"], e["main"]) for e in found.entries] == [
            *(("step", "a", 1, True), ("now", "", 1, True), ("output", "report", 1, False)),
            *(("token", "", 1, True), ("wait", "notes", 1, True)),
        ]
        assert (found.entries[-1]["outcome"], found.entries[-1]["data"]) == ("completed", "hello")

    def test_a_wait_that_is_not_over_is_left_out(self) -> None:
        assert recorded([_event("waiting", kind="timer", name="timer", n=1, main=True)], attempt=1).entries == []

    @pytest.mark.parametrize(
        "last",
        [
            [_event("step", call="step", name="bad", n=1, main=True, error={"type": "E", "message": "m"})],
            [
                _event("waiting", kind="stream", name="notes", n=1, main=True),
                _event("wait_timed_out", kind="stream"),
            ],
        ],
        ids=["step", "wait"],
    )
    def test_what_an_attempt_failed_of_is_left_out_for_the_next(self, last: list[RunEvent]) -> None:
        events = [_event("step", call="step", name="a", n=1, main=True, result=1), *last]
        assert len(recorded(events, attempt=1).entries) == 2
        assert [entry["name"] for entry in recorded(events, attempt=2).entries] == ["a"]
        beyond = [*events, _event("step", call="step", name="b", n=1, main=True, result=1)]
        assert len(recorded(beyond, attempt=2).entries) == 3, "the task went on after it"
