"""Has an engine make the machine that a sandbox asks for: its image, its limits, and the code it is to have ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from helmr.models import Deployment
from helmr.subjects import Scope
from worker.engine import (
    BuildSecrets,
    Engine,
    ImageGone,
    ImageSpec,
    Limits,
    Machine,
    MachineSpec,
    Network,
    Provision,
    Template,
)
from worker.sources import Sources


class Needs(NamedTuple):
    """What a run needs of its workspace: the deployment's source, the sandbox, and somebody to tell how it is going."""

    deployment: Deployment
    sandbox: dict[str, Any]
    progress: Callable[[str], None]
    #: What the first process in it can be forked from.
    template: Template | None = None
    #: Told the name of each step of the preparation when it is over.
    over: Callable[[str], None] = lambda _: None
    #: Asked for what an image is built with; None: there is nobody to ask.
    secrets: BuildSecrets | None = None


class MachineMaker:
    """Makes the machines of one worker."""

    def __init__(self, engine: Engine, sources: Sources, *, worker_id: str) -> None:
        self._engine = engine
        self._sources = sources
        self._worker_id = worker_id

    async def make(self, scope: Scope, workspace_id: str, claim: int, needs: Needs) -> Machine:
        """A live machine of a workspace that is claimed; once more if its image is removed just then.

        Raises:
            ImageError, EngineUnavailable, Unavailable: it cannot be made.
        """
        try:
            return await self._make(scope, workspace_id, claim, needs)
        except ImageGone:
            return await self._make(scope, workspace_id, claim, needs)

    async def deliver(self, machine: Machine, deployment: Deployment) -> None:
        """Put the source of a deployment into a machine."""
        await machine.put_source(deployment.content_hash, await self._sources.tree(deployment))

    async def _make(self, scope: Scope, workspace_id: str, claim: int, needs: Needs) -> Machine:
        image = await self._engine.ensure_image(await self._image(needs), needs.progress, needs.secrets)
        needs.over("image")
        provision = await self._provision(scope, needs)
        return await self._engine.materialize(self._spec(workspace_id, claim, image, needs.sandbox, provision))

    async def _image(self, needs: Needs) -> ImageSpec:
        image = needs.sandbox["image"]
        steps = tuple(tuple(str(part) for part in step) for step in image["steps"])
        needs_context = any(step[0] == "copy" for step in steps)
        context = await self._sources.tree(needs.deployment) if needs_context else None
        return ImageSpec(base=image["base"], steps=steps, context=context)

    async def _provision(self, scope: Scope, needs: Needs) -> Provision:
        tree = await self._sources.tree(needs.deployment)
        return Provision(owner=str(scope), source=needs.deployment.content_hash, tree=tree, template=needs.template)

    def _spec(
        self, workspace_id: str, claim: int, image: str, sandbox: dict[str, Any], provision: Provision
    ) -> MachineSpec:
        limits = {key: sandbox[key] for key in ("cpu", "memory", "pids", "disk") if sandbox.get(key) is not None}
        return MachineSpec(
            workspace_id=workspace_id,
            worker_id=self._worker_id,
            claim=claim,
            image=image,
            mount_path=sandbox["mount_path"],
            limits=msgspec.convert(limits, Limits, strict=False),
            network=_policy(sandbox.get("network", "none")),
            provision=provision,
        )


def _policy(network: str | list[str]) -> Network:
    """The network policy of an index; what is not understood is no network."""
    if isinstance(network, str):
        return "internet" if network == "internet" else "none"
    return tuple(network)
