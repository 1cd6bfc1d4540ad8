"""The task runner: calls, results, failures and cancellation, each in a real process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.unit.task_process import PROJECT, TaskProcess, run


def line_of(text: str) -> str:
    """Where this text stands in the tasks module."""
    lines = (PROJECT / "tasks.py").read_text().splitlines()
    return f"tasks.py:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def test_a_task_is_called_with_payload_and_context(tmp_path: Path) -> None:
    told = run(tmp_path, "facts", {"name": "x"})
    assert told.code == 0
    assert [each["op"] for each in told.messages] == ["started", "result"]
    assert told.last["output"] == {
        "type": "Person",
        "age": 1,
        "run": "run_1",
        "session": "ses_1",
        "attempt": 2,
        "turn": 1,
        "workspace": str(tmp_path),
        "cwd": str(tmp_path),
        "cancelled": False,
    }


@pytest.mark.parametrize(
    ("task_id", "payload", "output"),
    [
        ("nothing", None, None),
        ("echo", {"a": [1, None, 2.5]}, {"a": [1, None, 2.5]}),
        ("with-default", None, 7),
        ("with-nullable-default", None, None),
        ("asynchronous", "ä", "ä"),
        ("rows", {"x": 1}, [{"x": 1}]),
        ("times", "2026-05-01T00:00:00Z", ["2026-05-01T00:00:00Z", [2026]]),
    ],
)
def test_payloads_and_outputs_need_the_standard_library_alone(
    tmp_path: Path, task_id: str, payload: Any, output: Any
) -> None:
    told = run(tmp_path, task_id, payload, flags=("-I", "-S"))
    assert (told.code, told.last) == (0, {"op": "result", "output": output})


@pytest.mark.parametrize("task_id", ["struct", "model"])
def test_libraries_convert_their_own_types(tmp_path: Path, task_id: str) -> None:
    told = run(tmp_path, task_id, {"x": 1}, module="structs")
    assert (told.code, told.last) == (0, {"op": "result", "output": {"x": 2}})


def test_output_goes_to_the_pipes_and_is_never_taken_for_a_result(tmp_path: Path) -> None:
    told = run(tmp_path, "prints")
    assert (told.code, told.stdout, told.stderr) == (0, '{"op":"result"}\ntail', "err")
    assert told.last["output"] == 1


def test_what_a_task_says_arrives_in_order(tmp_path: Path) -> None:
    told = run(tmp_path, "says")
    assert told.code == 0
    assert [each["op"] for each in told.messages] == ["started", "log", "metadata", "output", "log", "log", "result"]
    first, fourth, fifth = told.all("log")
    assert (first["level"], first["message"], first["fields"]) == ("info", "one", {"n": 1})
    assert first["at"].endswith("Z")
    assert (fourth["level"], fourth["message"], fourth["fields"]) == ("warning", "four 4", {"k": "v", "logger": "lib"})
    assert "ZeroDivisionError" in fifth["fields"]["exception"]
    assert told.all("metadata")[0]["metadata"] == {"from": "start", "phase": "two"}
    key = {"n": 1, "main": True}
    assert told.all("output")[0] == {"op": "output", "stream": "notes", "data": {"n": 3}, "correlation_id": "c"} | key


def test_threads_may_log_at_the_same_time(tmp_path: Path) -> None:
    told = run(tmp_path, "chats")
    assert told.code == 0
    for speaker in range(4):
        said = [each["fields"]["number"] for each in told.all("log") if each["fields"]["speaker"] == speaker]
        assert said == list(range(200))


def test_surrogates_do_not_break_the_channel(tmp_path: Path) -> None:
    told = run(tmp_path, "surrogates")
    assert (told.code, told.last["output"], told.all("log")[0]["fields"]) == (0, "�", {"b": "�"})


def test_a_long_output_comes_in_parts(tmp_path: Path) -> None:
    told = run(tmp_path, "long-output")
    parts = [each["data"] for each in told.all("result_part")]
    assert (told.code, told.last) == (0, {"op": "result", "parts": len(parts)})
    assert json.loads("".join(parts)) == {"text": '"\\ä😀' * 500_000}


@pytest.mark.parametrize(
    ("task_id", "payload", "code", "error"),
    [
        (
            "raises",
            None,
            1,
            {"type": "ValueError", "message": "bad value", "where": line_of('ValueError("bad value")')},
        ),
        ("raises-later", None, 1, {"type": "KeyError", "message": "'k'", "where": line_of('KeyError("k")')}),
        ("raises-unprintable", None, 1, {"message": "(its __str__ raised RuntimeError)"}),
        ("raises-hint", None, 1, {"type": "UsageError", "message": "wrong", "hint": "do so"}),
        ("raises-cancelled", None, 1, {"type": "Cancelled"}),
        ("raises-asyncio-cancelled", None, 1, {"type": "CancelledError"}),
        ("recurses", None, 1, {"type": "RecursionError"}),
        ("takes-a-number", "x", 1, {"type": "PayloadInvalid"}),
        ("missing", None, 1, {"type": "ProjectError", "message": "module 'tasks' defines no task 'missing'"}),
        ("exits", None, 0, {"code": "task_exit", "message": "the task called sys.exit(0) instead of returning"}),
        ("exits", 3, 3, {"code": "task_exit", "exit_code": 3}),
        ("exits", "no luck", 1, {"message": "the task called sys.exit(1) instead of returning: no luck"}),
        ("exits-later", None, 4, {"code": "task_exit", "exit_code": 4}),
        ("returns-bytes", None, 1, {"code": "output_invalid"}),
        ("returns-nan", None, 1, {"code": "output_invalid"}),
        ("returns-something", None, 1, {"code": "output_invalid"}),
        (
            "returns-other",
            None,
            1,
            {"message": "the task did not return what it declares: expected a whole number, got 'x'"},
        ),
        ("returns-too-much", None, 1, {"code": "output_too_large"}),
    ],
)
def test_every_failure_is_told(tmp_path: Path, task_id: str, payload: Any, code: int, error: dict[str, Any]) -> None:
    told = run(tmp_path, task_id, payload)
    assert told.code == code
    assert told.last["op"] == "error"
    expected = {"code": "task_error", **error} if {"type", "where"} & set(error) else error
    assert {key: told.last.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("source", "code", "error"),
    [
        ("x = 1\nimport nowhere\n", 1, {"type": "ModuleNotFoundError", "where": "broken.py:2"}),
        ("x = 1\ndef broken(:\n", 1, {"type": "SyntaxError", "where": "broken.py:2"}),
        ("import sys\nsys.exit(2)\n", 2, {"code": "task_exit", "exit_code": 2}),
    ],
)
def test_a_broken_module_is_told(tmp_path: Path, source: str, code: int, error: dict[str, Any]) -> None:
    (tmp_path / "broken.py").write_text(source)
    told = run(tmp_path, "t", source_path=str(tmp_path), module="broken")
    assert told.code == code
    assert {key: told.last.get(key) for key in error} == error
    if code == 1:
        assert told.last["message"].startswith("cannot import the module 'broken': ")
        assert told.last["message"].endswith("(broken.py:2)")


def test_a_task_may_be_defined_by_another_module_of_the_project(tmp_path: Path) -> None:
    told = run(tmp_path, "echo", 5, module="structs", modules=["structs", "tasks"])
    assert told.last["output"] == 5


def test_a_traceback_shows_the_authors_frames_only(tmp_path: Path) -> None:
    trace = run(tmp_path, "raises-from").last["traceback"]
    assert "helmr/" not in trace.replace(str(PROJECT), "")
    assert trace.count("in raises_from\n") == 2
    assert "direct cause" in trace
    assert trace.endswith("RuntimeError: worse\n")


def test_long_messages_and_tracebacks_are_cut(tmp_path: Path) -> None:
    last = run(tmp_path, "raises-at-length").last
    assert len(last["message"]) < 20_000
    assert len(last["traceback"]) < 64 * 1024
    assert last["traceback"].rstrip().endswith("end")
    assert "characters left out" in last["message"]


@pytest.mark.parametrize(
    "task_id",
    [
        "leaves-thread",
        "leaves-asyncio-task",
        "leaves-executor",
        "leaves-stubborn-task",
        "leaves-unflushed-file",
        "closes-stdout",
    ],
)
def test_it_ends_when_the_function_returns(tmp_path: Path, task_id: str) -> None:
    told = run(tmp_path, task_id)
    assert (told.code, told.last) == (0, {"op": "result", "output": 1})
    if task_id == "leaves-unflushed-file":
        assert (tmp_path / "kept.txt").read_text() == "all of it"


def test_a_forked_child_does_not_speak_for_the_task(tmp_path: Path) -> None:
    told = run(tmp_path, "forks")
    assert (told.code, told.last["output"]) == (0, 0)
    assert (told.all("log"), told.all("metadata")) == ([], [])
    assert (told.stdout, told.stderr) == ("refused\n", "INFO child\n")


def test_a_forked_child_that_fails_keeps_its_exit_code(tmp_path: Path) -> None:
    told = run(tmp_path, "forks-failing")
    assert (told.code, told.last["output"]) == (0, [5, 1, 1])
    assert "RuntimeError: in the child" in told.stderr


def test_children_of_a_task_die_of_sigterm(tmp_path: Path) -> None:
    assert run(tmp_path, "terminates-child").last["output"] == -signal.SIGTERM


CANCELLED, PARTIAL = {"op": "cancelled"}, {"op": "result", "output": "partial"}


@pytest.mark.parametrize(
    ("task_id", "last", "code"),
    [
        ("cancelled", CANCELLED, 143),
        ("cancelled-later", CANCELLED, 143),
        ("catches-exceptions", CANCELLED, 143),
        ("fails-cleaning-up", CANCELLED, 143),
        ("returns-when-cancelled", PARTIAL, 0),
        ("returns-when-cancelled-later", PARTIAL, 0),
    ],
)
def test_sigterm_cancels(tmp_path: Path, task_id: str, last: dict[str, Any], code: int) -> None:
    with TaskProcess(tmp_path, task_id) as process:
        process.until_line(b"go\n")
        process.terminate()
        process.finish()
    assert (process.code, process.last) == (code, last)
    assert process.stdout == "cleaned True\n"


def test_only_the_first_sigterm_interrupts(tmp_path: Path) -> None:
    with TaskProcess(tmp_path, "cleans-slowly") as process:
        process.until_line(b"go\n")
        process.terminate()
        process.until_line(b"cleaning\n")
        process.terminate()
        process.finish()
    assert (process.code, process.stdout) == (143, "clean\n")


def test_sigterm_while_importing_cancels(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    with TaskProcess(tmp_path, "t", source_path=str(tmp_path), module="slow") as process:
        process.until_line(b"importing\n")
        process.terminate()
        process.finish()
    assert (process.code, process.messages) == (143, [CANCELLED])


def test_sigterm_in_the_middle_of_a_message_does_not_tear_it(tmp_path: Path) -> None:
    with TaskProcess(tmp_path, "logs-for-ever") as process:
        for _ in range(20):
            process.receive()
        process.terminate()  # the socket is full: it is in the middle of sending
        process.finish()
    assert (process.code, process.last) == (143, CANCELLED)


def test_sigterm_after_the_function_has_returned_changes_nothing(tmp_path: Path) -> None:
    with TaskProcess(tmp_path, "long-output") as process:
        process.until("result_part")  # the rest does not fit into the socket
        process.terminate()
        process.finish()
    assert (process.code, process.last["op"]) == (0, "result")


def test_a_supervisor_that_went_away_ends_the_task(tmp_path: Path) -> None:
    with TaskProcess(tmp_path, "logs-for-ever") as process:
        process.until("started")
        process.sock.close()
        _, err = process.process.communicate(timeout=20)
    assert process.process.returncode == 1
    assert b"no longer listens" in err
