"""What is found in a deployment, and what is said when it is not there, or does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from bus import declared
from helmr import events
from helmr.errors import NotFound, PayloadInvalid
from helmr.models import Deployment

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "to": {"type": "array", "items": {"type": "string"}}},
    "required": ["name"],
}
_TASKS: list[dict[str, Any]] = [{"id": "greet", "payload_schema": _SCHEMA}, {"id": "great"}]


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
        index={"tasks": _TASKS, "queues": [{"name": "letters"}]},
    )


@pytest.mark.parametrize(
    ("name", "hint"), [("gret", "did you mean greet?"), ("zzz", "deployed tasks: great, greet"), ("", "deployed")]
)
def test_a_task_that_is_not_there_is_named_with_its_like(name: str, hint: str) -> None:
    with pytest.raises(NotFound) as refused:
        declared.find_task(_deployment(), name)
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"name": "Ada"}, None),
        ({"name": 5}, "$.name"),
        ({"name": "A", "to": ["x", 5]}, "$.to[1]"),
        ({}, "$"),
        (None, "$"),
    ],
)
def test_a_payload_is_held_to_its_schema(payload: Any, path: str | None) -> None:
    deployment = _deployment()
    task = declared.find_task(deployment, "greet")
    if path is None:
        declared.check_payload(deployment, task, payload)
    else:
        with pytest.raises(PayloadInvalid) as refused:
            declared.check_payload(deployment, task, payload)
        assert refused.value.details.get("path", "$") == path


def test_a_task_without_a_schema_takes_anything() -> None:
    declared.check_payload(_deployment(), _TASKS[1], {"any": ["thing"]})


def test_a_queue_must_be_declared() -> None:
    declared.check_queue(_deployment(), None)
    declared.check_queue(_deployment(), "letters")
    with pytest.raises(NotFound) as refused:
        declared.check_queue(_deployment(), "leters")
    assert refused.value.hint == "did you mean letters?"
