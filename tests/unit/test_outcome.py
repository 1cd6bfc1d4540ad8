"""How a run ends, judged from what its process said and how it exited."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helmr.events import MAX_VALUE
from worker import messages
from worker.engine import Exited
from worker.messages import Broken
from worker.outcome import MAX_PARTS, Cancelled, Failed, Lost, Outcome, Said, Succeeded, judge, loss

_RETURNED: dict[str, Any] = {"op": "result", "output": {"n": 1}}
_ERROR: dict[str, Any] = {"op": "error", "code": "task_error", "type": "ValueError", "message": "no", "traceback": "…"}


def _said(*bodies: dict[str, Any]) -> Said:
    said = Said()
    for body in bodies:
        message = messages.parse(body)
        assert isinstance(message, messages.Result | messages.ResultPart | messages.Error)
        said.hear(message)
    return said


def _judge(said: Said, exited: Exited, *, cancel: bool = False, schema: Any = None) -> Outcome:
    return judge(said, exited, cancel_requested=cancel, max_duration=900, memory=96 * 1024**2, schema=schema)


def test_running_out_of_memory_names_the_limit() -> None:
    outcome = _judge(Said(), Exited(signal=9, oom=True))
    assert isinstance(outcome, Failed)
    assert "96 MiB" in outcome.failure.message
    assert outcome.failure.detail == {"signal": 9, "limit_bytes": 96 * 1024**2}


@pytest.mark.parametrize(
    ("bodies", "exited", "code"),
    [
        ([_ERROR], Exited(exit_code=1), "task_error"),
        ([_ERROR | {"code": "output_invalid"}], Exited(exit_code=1), "output_invalid"),
        ([_ERROR | {"code": "worker_lost"}], Exited(exit_code=1), "task_error"),
        ([_ERROR | {"code": "invented"}], Exited(exit_code=1), "task_error"),
        ([], Exited(exit_code=0), "task_exit"),
        ([], Exited(exit_code=7), "task_exit"),
        ([], Exited(signal=11), "task_exit"),
        ([], Exited(signal=64), "task_exit"),
        ([], Exited(detail="no such file"), "task_exit"),
        ([], Exited(signal=9, oom=True), "out_of_memory"),
        ([_ERROR], Exited(exit_code=1, oom=True), "out_of_memory"),
        ([], Exited(oom=True, cause="unknown"), "out_of_memory"),
        ([_RETURNED], Exited(exit_code=1), "task_exit"),
        ([_RETURNED], Exited(signal=9, cause="deadline"), "max_duration"),
        ([_RETURNED], Exited(exit_code=0, cause="deadline"), "max_duration"),
        ([{"op": "result", "output": "x" * MAX_VALUE}], Exited(exit_code=0), "output_too_large"),
    ],
)
def test_a_failure_has_its_code(bodies: list[dict[str, Any]], exited: Exited, code: str) -> None:
    outcome = _judge(_said(*bodies), exited)
    assert isinstance(outcome, Failed)
    assert outcome.failure.code == code
    assert outcome.exit_code == exited.exit_code


@pytest.mark.parametrize(
    ("exited", "asked", "lost"),
    [
        (Exited(cause="lost"), True, True),
        (Exited(cause="lost", detail="the container is gone"), False, True),
        (Exited(signal=15, cause="cancel"), False, True),
        (Exited(signal=15, cause="cancel"), True, False),
        (Exited(signal=15), False, False),
        (Exited(signal=9, cause="deadline"), False, False),
        (Exited(exit_code=0), False, False),
        (Exited(cause="unknown"), False, False),
    ],
)
def test_what_somebody_else_ended_is_lost(exited: Exited, asked: bool, lost: bool) -> None:
    assert (loss(exited, asked=asked) is not None) == lost


@pytest.mark.parametrize(
    ("bodies", "exited", "cancel", "kind"),
    [
        ([_RETURNED], Exited(exit_code=0), False, Succeeded),
        ([_RETURNED], Exited(exit_code=0, oom=True), False, Succeeded),
        ([_RETURNED], Exited(exit_code=0), True, Succeeded),
        ([_RETURNED], Exited(exit_code=0, cause="cancel"), True, Cancelled),
        ([_ERROR], Exited(exit_code=1), True, Cancelled),
        ([], Exited(signal=15, cause="cancel"), True, Cancelled),
        ([], Exited(signal=9, cause="deadline"), True, Cancelled),
        ([_RETURNED], Exited(cause="lost"), False, Lost),
        ([], Exited(cause="lost"), True, Lost),
        ([_RETURNED], Exited(cause="unknown"), False, Lost),
    ],
)
def test_what_ended_it_first_counts(bodies: list[dict[str, Any]], exited: Exited, cancel: bool, kind: type) -> None:
    assert isinstance(_judge(_said(*bodies), exited, cancel=cancel), kind)


@pytest.mark.parametrize(
    ("exited", "says"),
    [
        (Exited(signal=9), "SIGKILL"),
        (Exited(signal=250), "signal 250"),
        (Exited(exit_code=3), "code 3"),
        (Exited(detail="no such file"), "could not be started: no such file"),
    ],
)
def test_an_exit_is_described(exited: Exited, says: str) -> None:
    outcome = _judge(Said(), exited)
    assert isinstance(outcome, Failed)
    assert says in outcome.failure.message


@pytest.mark.parametrize(
    ("output", "path"),
    [({"n": 1}, None), ({"n": "one"}, "$.n"), ({}, "$"), (5, "$")],
)
def test_the_output_is_held_to_its_schema(output: Any, path: str | None) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    outcome = _judge(_said({"op": "result", "output": output}), Exited(exit_code=0), schema=schema)
    if path is None:
        assert outcome == Succeeded(output)
    else:
        assert isinstance(outcome, Failed)
        assert (outcome.failure.code, outcome.failure.detail["path"]) == ("output_invalid", path)


def test_an_output_in_pieces_is_put_together() -> None:
    text = json.dumps({"text": "ä" * 100})
    parts = [{"op": "result_part", "data": text[at : at + 7]} for at in range(0, len(text), 7)]
    said = _said(*parts, {"op": "result", "parts": len(parts)})
    assert _judge(said, Exited(exit_code=0)) == Succeeded({"text": "ä" * 100})


@pytest.mark.parametrize(
    "pieces", [["{"], ["[" * 100_000], [], ["x" * (MAX_PARTS + 1)]], ids=["half", "deep", "none", "much"]
)
def test_pieces_that_make_no_output_break_the_protocol(pieces: list[str]) -> None:
    with pytest.raises(Broken):
        _said(*({"op": "result_part", "data": piece} for piece in pieces), {"op": "result", "parts": len(pieces)})


def test_what_a_failure_carries_is_bounded() -> None:
    body = _ERROR | {"message": "m" * 900_000, "traceback": "t" * 900_000, "type": "T" * 900_000}
    outcome = _judge(_said(body), Exited(exit_code=1))
    assert isinstance(outcome, Failed)
    assert len(outcome.failure.message) + sum(len(str(v)) for v in outcome.failure.detail.values()) < 120_000


def test_a_broken_protocol_outweighs_what_was_said() -> None:
    said = _said(_RETURNED)
    said.broken = "it sent nonsense"
    outcome = _judge(said, Exited(signal=9))
    assert isinstance(outcome, Failed)
    assert (outcome.failure.code, outcome.failure.message) == ("task_error", "it sent nonsense")


@pytest.mark.parametrize(
    "body",
    [
        {"op": "started"},
        {"op": "log", "level": "info", "message": "m", "fields": {"a": 1}, "at": "2026-03-01T00:00:00Z"},
        {"op": "metadata", "metadata": {"a": 1}, "changed": ["a"]},
        {"op": "output", "stream": "report", "data": None},
        {"op": "output", "stream": "report", "data": 1, "correlation_id": "c"},
        {"op": "result", "output": None},
        {"op": "error", "message": "m", "something": "new"},
        {"op": "cancelled"},
    ],
    ids=lambda body: body["op"],
)
def test_every_documented_message_is_understood(body: dict[str, Any]) -> None:
    messages.parse(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"op": 5},
        {"op": "unheard-of"},
        {"op": "log"},
        {"op": "metadata", "metadata": []},
        {"op": "output", "stream": 1},
    ],
)
def test_anything_else_breaks_the_protocol(body: dict[str, Any]) -> None:
    with pytest.raises(Broken, match="protocol"):
        messages.parse(body)
