"""The process engine under a worker that was stopped, replaced, and woken up: its successor has its way."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helmr.errors import Unavailable
from worker.engine import MachineSpec
from worker.process_boot import ProcessBoot
from worker.process_engine import ProcessEngine

pytestmark = pytest.mark.anyio

SPEC = MachineSpec(workspace_id="ws_1", worker_id="wrk_1", image="none", claim=3)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[ProcessEngine]:
    engine = ProcessEngine(tmp_path)
    yield engine
    await engine.close()


async def test_a_machine_that_is_taken_away_while_it_boots_is_unavailable(
    engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = ProcessBoot._spawn

    async def interrupted(self: ProcessBoot, *words: object) -> object:
        process = await spawn(self, *words)  # type: ignore[arg-type]
        await _successor_clears(engine)
        return process

    monkeypatch.setattr(ProcessBoot, "_spawn", interrupted)
    with pytest.raises(Unavailable, match="another worker"):
        await engine.materialize(SPEC)


async def test_a_machine_that_is_taken_away_before_it_has_its_source_is_unavailable(
    engine: ProcessEngine, tmp_path: Path
) -> None:
    machine = await engine.materialize(SPEC)
    (tmp_path / "tree").mkdir()
    await _successor_clears(engine)
    with pytest.raises(Unavailable, match="another worker"):
        await machine.put_source("src", tmp_path / "tree")


async def _successor_clears(engine: ProcessEngine) -> None:
    (folder,) = engine._folders(SPEC.workspace_id)
    shutil.rmtree(folder.path)
