"""What a deployment declares: its tasks, sandboxes and queues by name, payloads that fit a task, the secrets that it needs."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.exceptions import best_match

from helmr.errors import NotFound, PayloadInvalid
from helmr.models import Deployment
from helmr.sandbox import SECRET_RUN, step_variables


def find_task(deployment: Deployment, task_id: str) -> dict[str, Any]:
    """A task of a deployment, by id.

    Raises:
        NotFound: with the closest name as hint.
    """
    tasks: dict[str, dict[str, Any]] = {task["id"]: task for task in deployment.index["tasks"]}
    if task_id in tasks:
        return tasks[task_id]
    close = get_close_matches(task_id, tasks, n=1)
    hint = f"did you mean {close[0]}?" if close else f"deployed tasks: {', '.join(sorted(tasks))}"
    raise NotFound(f"no task {task_id!r} in deployment {deployment.version}", hint=hint)


def find_sandbox(deployment: Deployment, name: str) -> dict[str, Any]:
    """A sandbox of a deployment, by name.

    Raises:
        NotFound: with those that there are as hint.
    """
    sandboxes: dict[str, dict[str, Any]] = {box["name"]: box for box in deployment.index["sandboxes"]}
    if name not in sandboxes:
        hint = f"there are: {', '.join(sorted(sandboxes))}"
        raise NotFound(f"no sandbox {name!r} in deployment {deployment.version}", hint=hint)
    return sandboxes[name]


def check_queue(deployment: Deployment, name: str | None) -> None:
    """Refuse a queue that the deployment does not declare.

    Raises:
        NotFound: no such queue; with the closest name as hint.
    """
    queues = [queue["name"] for queue in deployment.index.get("queues", ())]
    if name is not None and name not in queues:
        close = get_close_matches(name, queues, n=1)
        hint = f"did you mean {close[0]}?" if close else f"declared queues: {', '.join(queues) or 'none'}"
        raise NotFound(f"no queue {name!r} in deployment {deployment.version}", hint=hint)


def check_payload(deployment: Deployment, task: dict[str, Any], payload: Any) -> None:
    """Refuse a payload that does not fit the task's schema.

    Raises:
        PayloadInvalid: with the JSON path of the worst mismatch.
    """
    schema = task.get("payload_schema")
    if schema is None:
        return
    error = best_match(_validator(deployment.id, task["id"], msgspec.json.encode(schema)).iter_errors(payload))
    if error is not None:
        if payload is None:
            raise PayloadInvalid(f"task {task['id']} needs a payload, and none was given", hint=_schema_hint(task))
        where = error.json_path if error.json_path != "$" else "the payload"
        raise PayloadInvalid(
            f"payload does not fit task {task['id']}: {where}: {error.message[:500]}",
            hint=_schema_hint(task),
            details={"path": error.json_path},
        )


def _schema_hint(task: dict[str, Any]) -> str:
    return f"see its schema with `helmr task get {task['id']}`"


@lru_cache(maxsize=512)
def _validator(_deployment_id: str, _task_id: str, schema: bytes) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(msgspec.json.decode(schema))


def secret_names(deployment: Deployment, task: dict[str, Any]) -> tuple[str, ...]:
    """The secrets that a run of the task may need: its own, and those that its image is built with."""
    names = [secret["name"] for secret in task.get("secrets", ())]
    sandboxes = (each for each in deployment.index.get("sandboxes", ()) if each["name"] == task.get("sandbox"))
    for kind, *arguments in (step for sandbox in sandboxes for step in sandbox["image"]["steps"]):
        if kind == SECRET_RUN:
            names += step_variables(arguments[1:]).values()
    return tuple(dict.fromkeys(names))
