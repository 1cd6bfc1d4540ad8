"""Something outside does the work and calls back: a token, its secret, and a webhook that completes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helmr import TaskContext, WaitTimeout, metadata, step, task, tokens


@dataclass
class Build:
    """What is to be built, and how long to wait for it."""

    ref: str
    timeout: str = "1h"


@task("webhook-token", max_duration="5m", park_after="30s")
def webhook_token(payload: Build, ctx: TaskContext) -> dict[str, Any]:
    """Order a build, and wait for the builder to call back."""
    token = tokens.create(payload.timeout, tags=["build"], metadata={"ref": payload.ref})
    step("order", order, ctx.workspace.path, payload.ref, token)
    metadata.set("phase", "waiting for the builder")
    try:
        result = token.wait()
    except WaitTimeout:
        return {"ref": payload.ref, "built": False, "why": "the builder did not call back"}
    return {"ref": payload.ref, "built": bool(result["ok"]), "image": result.get("image")}


def order(workspace: str, ref: str, token: tokens.Token) -> None:
    """Tell the builder where to call back. This one is a file; yours may be an HTTP request.

    The secret is made here, inside of the step: it is handed on once, and kept nowhere.
    """
    request = {"ref": ref, "callback": f"/v1/callbacks/{token.secret()}"}
    Path(workspace, "order.json").write_text(json.dumps(request))
