"""What a start request is checked for, and what it leads to."""

from __future__ import annotations

from typing import Any

import pytest

from bus import starts
from bus.starts import StartRequest
from helmr import events, ids
from helmr.errors import HelmrError, TooLarge, UsageError
from helmr.events import INLINE_VALUE
from helmr.models import Deployment

_TASKS: list[dict[str, Any]] = [
    {
        "id": "greet",
        "sandbox": "default",
        "max_duration": 900.0,
        "payload_schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "to": {"type": "array", "items": {"type": "string"}}},
            "required": ["name"],
        },
        "retry": {"max_attempts": 3, "min_delay": 2.0},
        "ttl": 60.0,
        "queue": "letters",
        "cancel_grace": 3.0,
        "on_worker_lost": "fail",
    },
    {"id": "great", "sandbox": "default", "max_duration": 60.0},
]


def _deployment() -> Deployment:
    return Deployment(
        id="dep_1",
        version="20260301.1",
        project="acme",
        environment="dev",
        content_hash="c",
        archive="a",
        archive_bytes=1,
        created_at=events.now(),
        index={"tasks": _TASKS, "sandboxes": [{"name": "default", "image": {"base": "debian", "steps": []}}]},
    )


def _request(**changes: Any) -> StartRequest:
    fixed: dict[str, Any] = {"task": "greet", "request_id": ids.new("req"), "payload": {"name": "Ada"}}
    return StartRequest(**fixed | changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, None),
        ({"payload": "x" * (INLINE_VALUE - 2)}, None),
        ({"payload": "x" * (INLINE_VALUE - 1)}, TooLarge),
        ({"payload": "ä" * (INLINE_VALUE // 2)}, TooLarge),
        ({"metadata": {"a": "x" * starts.MAX_METADATA}}, TooLarge),
        ({"tags": ["t" * 128] * 10}, None),
        ({"tags": ["t"] * 11}, TooLarge),
        ({"tags": ["t" * 129]}, TooLarge),
        ({"external_id": ""}, UsageError),
        ({"external_id": "x" * 512}, None),
        ({"external_id": "x" * 513}, UsageError),
        ({"concurrency_key": ""}, UsageError),
        ({"max_duration": 5.0}, None),
        ({"max_duration": 86_400.0}, None),
        ({"max_duration": 4.99}, UsageError),
        ({"max_duration": 86_400.1}, UsageError),
        ({"max_duration": 0.0}, UsageError),
        ({"max_duration": -1.0}, UsageError),
        ({"ttl": 0.0}, UsageError),
        ({"ttl": -5.0}, UsageError),
        ({"request_id": "run_" + "0" * 24}, UsageError),
        ({"request_id": ""}, UsageError),
    ],
)
def test_limits_are_kept(changes: dict[str, Any], error: type[HelmrError] | None) -> None:
    if error is None:
        starts.check_limits(_request(**changes))
    else:
        with pytest.raises(error):
            starts.check_limits(_request(**changes))


def test_the_request_overrides_the_task() -> None:
    deployment = _deployment()
    own = starts.run_spec(_request(), deployment, _TASKS[0], session_id="ses_1", workspace_id="ws_1")
    assert (own.max_duration, own.ttl, own.queue, own.cancel_grace, own.on_worker_lost) == (
        900,
        60,
        "letters",
        3,
        "fail",
    )
    assert own.retry is not None
    assert (own.retry.max_attempts, own.retry.min_delay, own.retry.factor) == (3, 2, 2)
    request = _request(max_duration=5.0, ttl=1.0, queue="other", tags=["b", "a", "b"], priority=3)
    spec = starts.run_spec(request, deployment, _TASKS[0], session_id="ses_1", workspace_id="ws_1")
    assert (spec.max_duration, spec.ttl, spec.queue, spec.tags, spec.priority) == (5, 1, "other", ("a", "b"), 3)


def test_a_fingerprint_is_that_of_what_was_asked_for() -> None:
    one = starts.fingerprint(_request(payload={"a": 1, "b": 2}))
    assert one == starts.fingerprint(_request(payload={"b": 2, "a": 1}))
    others: list[dict[str, Any]] = [
        {"payload": {"a": 1}},
        {"task": "great"},
        {"priority": 1},
        {"tags": ["x"]},
        {"workspace": "ws_1"},
    ]
    marks = {starts.fingerprint(_request(**{"payload": {"a": 1, "b": 2}, **other})) for other in others}
    assert len(marks | {one}) == len(others) + 1
