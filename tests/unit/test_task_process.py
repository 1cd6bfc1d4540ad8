"""What a worker says beforehand that a process will be forked from is what the supervisor finds when it is to start it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from helmr.events import RunSpec, RunState
from helmr.guest.shims import Key
from helmr.models import Deployment
from helmr.reducers.journal import Recorded
from worker.run_secrets import NONE, place
from worker.task_process import task_process, task_template

_FACTS: dict[str, Any] = {"session_id": "ses_1", "workspace_id": "ws_1", "deployment_id": "dep_1", "task_id": "review"}
_AT = datetime(2026, 11, 27, tzinfo=UTC)
_DEPLOYMENT = Deployment(
    id="dep_1",
    version="20261127.1",
    project="acme",
    environment="dev",
    content_hash="c0de",
    archive="a",
    archive_bytes=1,
    created_at=_AT,
    index={},
)


@pytest.mark.parametrize("preload", [[], ["json", "sqlite3"]])
@pytest.mark.parametrize(
    "secrets",
    [
        [],
        [{"name": "TOKEN", "env": "TOKEN", "file": None, "mode": 0o400}],
        [{"name": "KEY", "env": None, "file": "/run/secrets/key", "mode": 0o400}],
    ],
)
def test_both_know_the_same_template(preload: list[str], secrets: list[dict[str, Any]]) -> None:
    task = {"id": "review", "module": "tasks", "secrets": secrets}
    spec = task_process(
        "run_1",
        RunSpec(**_FACTS, deployment_version="20261127.1"),
        RunState(**_FACTS, id="run_1", status="running", cursor=7, created_at=_AT, queued_at=_AT),
        deployment=_DEPLOYMENT,
        module="tasks",
        preload=tuple(preload),
        payload=None,
        recorded=Recorded(entries=[]),
        secrets=place(secrets, {each["name"]: "s3cr3t" for each in secrets}) if secrets else NONE,
        deadline=1.0,
    )
    template = task_template(_DEPLOYMENT, task, {"name": "box", "preload": preload})
    found = Key.of(json.loads(msgspec.json.encode(spec)))
    assert found == (None if template is None else Key.from_wire(json.loads(msgspec.json.encode(template))))
    assert (found is None) == (bool(secrets) and not preload)
