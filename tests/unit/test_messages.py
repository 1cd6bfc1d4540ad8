"""What logger, metadata and output streams send, and what they do outside of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypedDict

import pytest

from helmr import TooLarge, UsageError, jsonform, logger, metadata, runtime, streams
from helmr.runtime import recording


class Row(TypedDict):
    n: int


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_log_line(level: str) -> None:
    with recording() as said:
        getattr(logger, level)("parsed", files=3, message="a field may be called anything", kind={1, 2})
    (line,) = said.logs
    assert line.pop("at").endswith("Z")
    assert line == {
        "op": "log",
        "level": level,
        "message": "parsed",
        "fields": {"files": 3, "message": "a field may be called anything", "kind": [1, 2]},
    }


def test_fields_that_are_not_json_are_shown_as_python_shows_them() -> None:
    with recording() as said:
        logger.info("x", data=b"bytes", nan=float("nan"), big=10**5000)
    fields = said.logs[0]["fields"]
    assert (fields["data"], fields["nan"]) == ("b'bytes'", "nan")
    assert "repr raised" in fields["big"]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("x" * 200_000, {}),
        ("ä" * 40_000, {}),
        ("short", {"a": 1, "b": "y" * 200_000, "c": 2}),
        ("x" * 70_000, {"a": 1}),
    ],
)
def test_a_line_is_cut_at_64_kib(message: str, fields: dict[str, Any]) -> None:
    with recording() as said:
        logger.info(message, **fields)
    line = said.logs[0]
    size = len(jsonform.encode(line["message"])) + len(jsonform.encode(line["fields"]))
    assert 30_000 < size <= 64 * 1024 + 64
    assert "[truncated]" in str(line)


def test_an_exception_carries_its_traceback() -> None:
    with recording() as said:
        try:
            raise KeyError("k")  # noqa: TRY301
        except KeyError:
            logger.exception("failed", step=1)
        logger.exception("nothing is being handled")
    first, second = said.logs
    assert first["fields"]["exception"].endswith("KeyError: 'k'")
    assert (first["level"], second["fields"]) == ("error", {})


def test_the_handler_carries_standard_records() -> None:
    record = logging.makeLogRecord(
        {"name": "lib", "levelname": "WARNING", "msg": "%s!", "args": ("hey",), "extra_field": 1}
    )
    with recording() as said:
        logger.Handler().emit(record)
    line = said.logs[0]
    assert (line["level"], line["message"], line["fields"]) == ("warning", "hey!", {"logger": "lib", "extra_field": 1})


def test_a_record_that_cannot_be_formatted_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.makeLogRecord({"msg": "%d", "args": ("x",)})
    with recording() as said:
        logger.Handler().emit(record)
    assert said.messages == []
    assert "Logging error" in capsys.readouterr().err


def test_outside_of_a_run_lines_go_to_standard_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="helmr.task"):
        logger.warning("100% done", n=1)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("helmr.task", "WARNING", "100% done n=1")


def test_metadata_is_sent_whole_with_what_changed() -> None:
    with recording(metadata={"a": 1}) as said:
        metadata.set("phase", "one")
        metadata.patch({"b": [1], "c": None})
        metadata.increment("a", by=2)
        metadata.increment("new")
        metadata.delete("b")
        metadata.delete("absent")
    assert [each["changed"] for each in said.messages] == [["phase"], ["b", "c"], ["a"], ["new"], ["b"]]
    assert said.messages[1]["metadata"] == {"a": 1, "phase": "one", "b": [1], "c": None}
    assert said.metadata == {"a": 3, "phase": "one", "c": None, "new": 1}
    assert said.messages[0]["metadata"] == {"a": 1, "phase": "one"}, "messages are snapshots"


def test_metadata_can_be_read_but_only_changed_by_saying_so() -> None:
    with recording(metadata={"a": {"b": [1]}}) as said:
        metadata.get("a")["b"].append(2)
        metadata.all()["c"] = 1
        assert metadata.get("a") == {"b": [1]}
        assert metadata.get("nope", 5) == 5
        assert metadata.all() == {"a": {"b": [1]}}
    assert said.messages == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda: metadata.set("k", "x" * 262_144), TooLarge),
        (lambda: metadata.patch({"k": 1, "l": b"x"}), UsageError),
        (lambda: metadata.set("", 1), UsageError),
        (lambda: metadata.set(1, 1), UsageError),  # type: ignore[arg-type]
        (lambda: metadata.increment("text"), UsageError),
        (lambda: metadata.increment("flag"), UsageError),
        (lambda: metadata.increment("n", by="1"), UsageError),  # type: ignore[arg-type]
        (lambda: metadata.increment("n", by=float("inf")), UsageError),
    ],
)
def test_a_refused_change_changes_nothing(change: Callable[[], None], error: type[Exception]) -> None:
    before = {"text": "x", "flag": True, "n": 1}
    with recording(metadata=before) as said:
        with pytest.raises(error):
            change()
        assert metadata.all() == before
    assert said.messages == []


def test_records_are_checked_against_the_streams_schema() -> None:
    rows, anything = streams.output("rows", schema=Row), streams.output("anything")
    with recording() as said:
        rows.append({"n": 1})
        rows.append({"n": 2}, correlation_id="c-2")
        anything.append(None)
        with pytest.raises(UsageError, match="a record does not fit the stream 'rows': n is missing"):
            rows.append({"m": 1})
        with pytest.raises(UsageError, match="bytes"):
            anything.append(b"x")
        with pytest.raises(TooLarge, match="262,146 bytes"):
            anything.append("x" * 262_144)
    assert said.output("rows") == [{"n": 1}, {"n": 2}]
    assert said.messages[1]["correlation_id"] == "c-2"
    assert said.output("anything") == [None]


@pytest.mark.parametrize(
    "call",
    [
        lambda: metadata.set("a", 1),
        lambda: metadata.increment("a"),
        lambda: metadata.get("a"),
        metadata.all,
        lambda: metadata.delete("a"),
        lambda: streams.output("o").append(1),
    ],
)
def test_outside_of_a_run_they_say_so(call: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="works only inside a run") as refused:
        call()
    assert "recording" in (refused.value.hint or "")


def test_recordings_nest_and_end() -> None:
    with recording() as outer:
        with recording() as inner:
            logger.info("in")
        logger.info("out")
    assert [len(each.logs) for each in (outer, inner)] == [1, 1]
    assert runtime.current() is None


def test_the_context_of_a_recording_looks_real(tmp_path: Any) -> None:
    with recording(workspace=tmp_path) as said:
        ctx = said.context
    assert (ctx.workspace.path, ctx.run.id, ctx.attempt, ctx.turn, ctx.cancelled) == (
        str(tmp_path),
        "run_test",
        1,
        0,
        False,
    )
    assert dict(ctx.run) == {"id": "run_test"}
    assert "run_test" in repr(ctx)
    with pytest.raises(AttributeError, match="RunFacts has no 'colour'; it has id"):
        _ = ctx.run.colour
