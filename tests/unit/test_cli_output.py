"""What commands print: the same data for people and for programs, and nothing else on stdout."""

from __future__ import annotations

import csv
import importlib
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cli import dev_state, output, results
from cli.errors import colour
from cli.follow import LogPrinter, conclude
from cli.payload import payload_of
from helmr.chunks import LogChunk
from helmr.errors import RunFailed, UsageError
from helmr.events import CancelRequest, Failure
from helmr.models import Run

#: pyarrow says nothing about its types.
pa: Any = importlib.import_module("pyarrow")
parquet: Any = importlib.import_module("pyarrow.parquet")

AT = datetime(2026, 1, 31, 12, 0, 1, tzinfo=UTC)


def run_record(**changes: Any) -> Run:
    """A run that succeeded, but for the changes."""
    fields: dict[str, Any] = dict.fromkeys(Run.__struct_fields__)
    fields |= {"id": "run_1", "status": "succeeded", "output": {"n": 1}, "created_at": AT, "started_at": AT}
    fields |= {"finished_at": AT + timedelta(seconds=1.2)}
    return Run(**(fields | changes))


def chunk(stream: str, data: bytes, *, tombstone: str | None = None, attempt: int = 1) -> LogChunk:
    """A chunk as the client gives it."""
    return LogChunk(seq=1, attempt=attempt, dispatch=1, stream=stream, offset=0, at=AT, data=data, tombstone=tombstone)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["name=Ada"], {"name": "Ada"}),
        (["n=5", "ok=true", "none=null", "list=[1,2]"], {"n": 5, "ok": True, "none": None, "list": [1, 2]}),
        (['text="5"', "equation=a=b", "empty="], {"text": "5", "equation": "a=b", "empty": ""}),
        (["a.b.c=1", "a.d=x"], {"a": {"b": {"c": 1}, "d": "x"}}),
        (["nan=NaN", "path=/usr/lib"], {"nan": "NaN", "path": "/usr/lib"}),
    ],
)
def test_payload_pairs(pairs: list[str], expected: dict[str, Any]) -> None:
    assert payload_of(pairs, None, None) == expected


@pytest.mark.parametrize("pairs", [["x"], ["=1"], ["a..b=1"], ["a=1", "a=2"], ["a=1", "a.b=2"]])
def test_payload_pairs_that_contradict_themselves(pairs: list[str]) -> None:
    with pytest.raises(UsageError):
        payload_of(pairs, None, None)


def test_payload_from_a_file_and_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "payload.json"
    file.write_text('{"a": "ä"}', encoding="utf-8")
    assert payload_of([], None, str(file)) == {"a": "ä"}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[1]")))
    assert payload_of([], None, "-") == [1]
    assert payload_of([], None, None) is None


def test_bytes_go_where_the_task_wrote_them(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printer = LogPrinter()
    for each in (chunk("stdout", b"a\xff\x00"), chunk("stderr", b"oops\n"), chunk("stdout", b"no newline")):
        printer.take(each)
    assert capfdbinary.readouterr() == (b"a\xff\x00no newline", b"oops\n")


def test_logger_lines_are_put_together_and_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LogPrinter()
    told = {
        "level": "info",
        "message": "parsed",
        "fields": {"files": 3, "where": "a b", "ok": True},
        "at": AT.isoformat(),
    }
    data = json.dumps(told).encode() + b"\nnot json\n"
    for part in (data[:10], data[10:30], data[30:]):
        printer.take(chunk("log", part))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f'{output.clock(AT)} INFO parsed files=3 where="a b" ok=true', "not json"]


def test_an_exception_in_a_logger_line_is_shown_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"exception": "Traceback:\n  boom", "n": 1}
    told = {"level": "error", "message": "failed", "fields": fields, "at": AT.isoformat()}
    LogPrinter().take(chunk("log", json.dumps(told).encode() + b"\n"))
    assert capsys.readouterr().err.splitlines() == [f"{output.clock(AT)} ERROR failed n=1", "Traceback:", "  boom"]


def test_a_log_that_ends_early_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    LogPrinter().take(chunk("log", b"", tombstone="worker_lost"))
    assert capsys.readouterr() == ("", "-- log ends here: worker lost --\n")


def test_the_log_stream_alone_is_json_lines_on_stdout(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    LogPrinter(raw=True).take(chunk("log", b'{"level":"info"}\n'))
    assert capfdbinary.readouterr() == (b'{"level":"info"}\n', b"")


def test_json_keeps_bytes_that_are_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LogPrinter(as_json=True)
    printer.take(chunk("stdout", b"ok\n"))
    printer.take(chunk("stdout", b"\xff"))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["type"], first["text"], first["bytes"], "base64" in first) == ("log", "ok\n", 3, False)
    assert (second["text"], second["base64"]) == ("\N{REPLACEMENT CHARACTER}", "/w==")


def test_a_run_that_succeeded_ends_with_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    conclude(run_record())
    assert capsys.readouterr() == ('{"n":1}\n', "run_1 succeeded in 1.2s\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"status": "failed", "failure": Failure(code="task_error", message="boom", detail={"traceback": "Trace…"})},
            "run run_1 failed after 1.2s: task_error: boom",
        ),
        (
            {"status": "cancelled", "cancel_requested": CancelRequest(reason="not needed")},
            "run run_1 cancelled after 1.2s: not needed",
        ),
        ({"status": "expired", "started_at": None}, "run run_1 expired after 1.2s"),
    ],
)
def test_a_run_that_did_not_succeed_is_an_error(
    changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunFailed) as caught:
        conclude(run_record(**changes))
    assert (caught.value.message, caught.value.exit_code) == (message, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("Trace…" in err) == (changes["status"] == "failed")


def test_tables_are_aligned_text_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("ID", "STATUS", "LAST"), [("run_1", "succeeded", None), ("run_22", "failed", 3)])
    assert capsys.readouterr().out == "ID      STATUS     LAST\nrun_1   succeeded\nrun_22  failed     3\n"


def test_an_empty_table_is_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("ID", "STATUS"), [])
    assert capsys.readouterr().out == "ID  STATUS\n"


def test_on_a_terminal_ids_stay_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    identity = "run_01m84qc88x4t3a25j43qaz74"
    output.table(("ID", "STATUS", "TEXT"), [(identity, "succeeded", "[bold]not markup[/bold] " * 3)])
    out = capsys.readouterr().out
    assert identity in out
    assert "succeeded" in out
    assert "[bold]not" in out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**31, "2.0 GiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


TABLE = pa.table(
    {
        "id": ["a", 'b"'],
        "payload": ['{"x":1}', None],
        "at": pa.array([AT, None], pa.timestamp("us", tz="UTC")),
        "ratio": [0.123456789, float("nan")],
        "sum": pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)),
        "tags": [["x", "y"], []],
    },
    schema=pa.schema(
        [
            ("id", pa.string()),
            pa.field("payload", pa.string(), metadata={"duckdb_type": "JSON"}),
            ("at", pa.timestamp("us", tz="UTC")),
            ("ratio", pa.float64()),
            ("sum", pa.decimal128(10, 2)),
            ("tags", pa.list_(pa.string())),
        ]
    ),
)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_query_results_as_json(form: str, tmp_path: Path) -> None:
    file = tmp_path / "out"
    results.write(TABLE, form, file)
    text = file.read_text()
    rows = json.loads(text) if form == "json" else [json.loads(each) for each in text.splitlines()]
    expected = {"id": "a", "payload": {"x": 1}, "at": "2026-01-31T12:00:01Z", "ratio": 0.123456789, "sum": "1.50"}
    assert rows[0] == expected | {"tags": ["x", "y"]}
    assert (rows[1]["payload"], rows[1]["ratio"]) == (None, None)


def test_query_results_as_csv_and_parquet(tmp_path: Path) -> None:
    results.write(TABLE, "csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "payload", "at", "ratio", "sum", "tags"]
    assert rows[1][:3] == ["a", '{"x":1}', "2026-01-31T12:00:01Z"]
    assert rows[2][:3] == ['b"', "", ""]
    results.write(TABLE, "parquet", tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["a", 'b"']


def test_query_results_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    results.write(TABLE.select(["id", "ratio"]), "table", None)
    out, err = capsys.readouterr()
    assert out.splitlines() == ["id  ratio", "a   0.123457", 'b"  nan']
    assert err == "2 rows\n"


def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        results.write(TABLE, "csv", tmp_path)


@pytest.mark.parametrize(
    ("given", "as_json", "expected"),
    [
        (None, False, "jsonl"),
        (None, True, "json"),
        ("x.csv", False, "csv"),
        ("x.parquet", True, "parquet"),
        ("x", False, "jsonl"),
    ],
)
def test_the_format_follows_from_where_the_rows_go(given: str | None, as_json: bool, expected: str) -> None:
    assert results.default_format(Path(given) if given else None, as_json=as_json) == expected


def test_what_dev_deploys_is_known_while_it_runs(tmp_path: Path) -> None:
    assert dev_state.read(tmp_path) is None
    dev_state.write(tmp_path, root=tmp_path, project="agents", env="dev", left_out=("dev.out",))
    state = dev_state.read(tmp_path)
    assert state is not None
    assert (state.project, state.env, state.root) == ("agents", "dev", str(tmp_path))
    assert state.left_out == ("dev.out",)
    dev_state.remove(tmp_path)
    assert dev_state.read(tmp_path) is None


def test_a_dev_that_is_gone_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps({"pid": 2**22 + 1, "root": "/", "project": "p", "env": "dev"}))
    assert dev_state.read(tmp_path) is None


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour(Terminal())
    assert not colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour(Terminal())


def test_a_moment_says_how_long_ago_it_was_or_how_soon_it_will_be() -> None:
    now = datetime.now(UTC)
    assert str(output.moment(now - timedelta(hours=2, minutes=5, seconds=1))).endswith("(2h 5m ago)")
    assert str(output.moment(now + timedelta(days=2, hours=1))).endswith("(in 2d 1h)")
    assert output.moment(None) is None
