"""Whether a run still fits the workspace it was started for: that may have been given another sandbox since.

Starts are checked against the workspace as it is then; but a session goes on with the deployment it began with, for as long as
it is open. Without this check one of its later runs would bring the workspace to life between its former walls.
"""

from __future__ import annotations

from typing import Any

from bus import attachment
from bus.declared import find_sandbox
from bus.deployments import Deployments
from helmr.errors import Conflict
from helmr.events import WorkspaceState
from helmr.subjects import Scope


class Fitting:
    """The check, with the deployments that sandboxes are found in."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    async def check(self, scope: Scope, state: WorkspaceState, needed: dict[str, Any]) -> None:
        """Refuse a workspace whose walls are not those that the sandbox ``needed`` asks for.

        Raises:
            Conflict: they differ; the message names each difference.
            NotFound: the deployment that the workspace has its sandbox of is gone.
        """
        if state.fingerprint == needed["fingerprint"]:
            return
        deployment = await self._deployments.load(scope, state.deployment_id)
        found = attachment.differences(find_sandbox(deployment, state.sandbox), needed)
        if found:
            raise Conflict(
                f"workspace {state.id} was given another sandbox since this was started: it has {'; '.join(found)}",
                hint="start a new session on it, or give it the former sandbox with `helmr workspace update`",
                details={"differences": found},
            )
