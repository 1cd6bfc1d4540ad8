"""``helmr dev`` and files that it causes to change: it does not deploy for ever, and goes on seeing everything else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cli.redeploy import Redeployer
from cli.restless import MANY
from helmr.errors import HelmrError, NotFound
from helmr.project import pack
from helmr.subjects import Scope

pytestmark = pytest.mark.anyio


class _Deployments:
    """Deploys nothing, but says so in the folder, like ``helmr dev > dev.out``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done = asyncio.Queue[str]()

    async def get(self) -> Any:
        raise NotFound("nothing is deployed")

    async def deploy(self, root: Path) -> Any:
        digest = pack(root).digest
        with (self.root / "dev.out").open("a") as out:
            out.write("deployed\n")
        self.done.put_nowait((self.root / "tasks.py").read_text())
        return SimpleNamespace(content_hash=digest, index={})


async def test_a_file_that_changes_with_each_deployment_does_not_lead_to_deployments_for_ever(tmp_path: Path) -> None:
    (tmp_path / "helmr.toml").write_text('project = "loops"\n')
    (tmp_path / "tasks.py").write_text("first")
    deployments, left_out, failures = _Deployments(tmp_path), asyncio.Queue[str](), list[HelmrError]()
    client = cast("Any", SimpleNamespace(scope=Scope("loops", "dev"), deployments=deployments))
    redeployer = Redeployer(client, tmp_path, lambda *_: None, failures.append, left_out.put_nowait, clock=lambda: 0.0)
    running = asyncio.create_task(redeployer.run())
    try:
        async with asyncio.timeout(60):
            assert await left_out.get() == "dev.out"
            begun = [await deployments.done.get() for _ in range(MANY)]
            (tmp_path / "tasks.py").write_text("second")
            while await deployments.done.get() != "second":
                begun.append("first")
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert MANY <= len(begun) <= MANY + 3  # the first ones belong to no row: the watcher may not have begun
    assert (failures, left_out.qsize()) == ([], 0)
