"""What a process that executes a task is told: its code, its payload and context, and what earlier executions recorded."""

from __future__ import annotations

from typing import Any

from helmr import trace_ids
from helmr.events import RunSpec, RunState
from helmr.models import Deployment
from helmr.reducers.journal import Recorded
from worker.engine import ProcessSpec, Template
from worker.run_secrets import RunSecrets

#: What :func:`task_process` puts into the environment of every process.
_ENVIRONMENT = ("HELMR_RUN_ID", "HELMR_TASK_ID", "HELMR_WORKSPACE_ID", "TRACEPARENT")


def task_template(deployment: Deployment, task: dict[str, Any], sandbox: dict[str, Any]) -> Template | None:
    """What the processes of a task can be forked from; None: from nothing.

    It must be what the supervisor finds when it is told to start one (:meth:`helmr.guest.shims.Key.of`). ``task`` and
    ``sandbox`` are entries of the deployment's index.
    """
    preload = tuple(sandbox.get("preload", ()))
    secrets = task.get("secrets", ())
    if secrets and not preload:
        return None
    private = {*_ENVIRONMENT, *(secret["env"] for secret in secrets if secret.get("env"))}
    return Template(
        source=deployment.content_hash,
        module="" if secrets else task["module"],
        private=tuple(sorted(private)),
        preload=preload,
    )


def task_process(
    run_id: str,
    spec: RunSpec,
    state: RunState,
    *,
    deployment: Deployment,
    module: str,
    preload: tuple[str, ...],
    payload: Any,
    recorded: Recorded,
    secrets: RunSecrets,
    deadline: float,
) -> ProcessSpec:
    """The process of one execution of a run; it may take ``deadline`` seconds."""
    body = {
        "module": module,
        "modules": [module],
        "task_id": spec.task_id,
        "payload": payload,
        "ctx": _context(run_id, spec, state, deployment),
        "metadata": spec.metadata,
        "metadata_calls": recorded.metadata_calls,
        "journal": recorded.entries,
        "cancel_grace": spec.cancel_grace,
    }
    lease = state.lease.cursor if state.lease else 0
    return ProcessSpec(
        id=f"{run_id}-{lease}",
        source=deployment.content_hash,
        task=body,
        preload=preload,
        deadline=deadline,
        grace=spec.cancel_grace,
        env={
            "HELMR_RUN_ID": run_id,
            "HELMR_TASK_ID": spec.task_id,
            "HELMR_WORKSPACE_ID": spec.workspace_id,
            "TRACEPARENT": trace_ids.traceparent(run_id, lease),
        },
        secrets=secrets.env,
        secret_files=secrets.files,
    )


def _context(run_id: str, spec: RunSpec, state: RunState, deployment: Deployment) -> dict[str, Any]:
    """``ctx``, as the authoring API documents it."""
    run = {
        "id": run_id,
        "tags": list(spec.tags),
        "metadata": state.metadata,
        "max_duration": spec.max_duration,
        "deployment_id": deployment.id,
        "deployment_version": deployment.version,
    }
    return {
        "run": run,
        "session": {"id": spec.session_id, "external_id": spec.external_id},
        "task": {"id": spec.task_id},
        "workspace": {"id": spec.workspace_id},
        "attempt": state.attempt,
        "turn": spec.turn,
    }
