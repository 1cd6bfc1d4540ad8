"""Killed at any point, capturing and restoring never leave a version that is corrupt, or lose one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bus.artifacts import DirectoryArtifacts
from bus.versions import Versions
from tests.integration.version_process import WORKSPACE, empty_state, read_state, write_state
from tests.unit.trees import describe

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

_KILLS = 30


class Forks:
    """The process that forks those which are killed."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process) -> None:
        self.home = home
        self._process = process

    async def run(self, what: str, *, kill_after: float | None = None) -> float | None:
        """Seconds that it took; None when it was killed before it had ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{what} {self.home} {'-' if kill_after is None else kill_after}\n".encode())
        code, took = (await stdout.readline()).split()
        assert int(code) in {0, -signal.SIGKILL}
        return float(took) if int(code) == 0 else None


@pytest.fixture
async def forks(tmp_path: Path) -> AsyncIterator[Forks]:
    module = "tests.integration.version_process"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, stdin=pipe, stdout=pipe)
    yield Forks(tmp_path, process)
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


def _change(root: Path, chance: random.Random) -> None:
    for _ in range(60):
        path = root / f"d{chance.randrange(5)}" / f"f{chance.randrange(40)}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(chance.randrange(80_000)))


async def _check(home: Path, manifest: str | None, expected: dict[str, tuple[object, ...]], scratch: Path) -> None:
    scratch.mkdir()
    await Versions(DirectoryArtifacts(home / "store")).restore(manifest, scratch, None)
    assert describe(scratch) == expected


async def test_killed_while_capturing(tmp_path: Path, forks: Forks) -> None:
    chance = random.Random(5)  # noqa: S311
    root = tmp_path / "workspaces" / WORKSPACE
    root.mkdir(parents=True)
    write_state(tmp_path, empty_state())
    _change(root, chance)
    whole = await forks.run("capture")
    assert whole is not None
    saved, killed = describe(root), 0
    for number in range(_KILLS):
        _change(root, chance)
        before = read_state(tmp_path).manifest
        ended = await forks.run("capture", kill_after=chance.uniform(0, whole))
        killed += ended is None
        after = read_state(tmp_path).manifest
        if after != before:
            saved = describe(root)
        await _check(tmp_path, after, saved, tmp_path / f"check{number}")
    assert killed > _KILLS / 4
    await forks.run("capture")
    await _check(tmp_path, read_state(tmp_path).manifest, describe(root), tmp_path / "last")


async def test_killed_while_restoring(tmp_path: Path, forks: Forks) -> None:
    chance = random.Random(6)  # noqa: S311
    root = tmp_path / "workspaces" / WORKSPACE
    root.mkdir(parents=True)
    write_state(tmp_path, empty_state())
    _change(root, chance)
    await forks.run("capture")
    state, saved = read_state(tmp_path), describe(root)
    write_state(tmp_path, msgspec.structs.replace(state, epoch=1))
    whole = await forks.run("restore")
    assert whole is not None
    killed = 0
    for number in range(_KILLS):
        _change(root, chance)  # what is there is of no use
        state = msgspec.structs.replace(state, epoch=number + 2)
        write_state(tmp_path, state)
        ended = await forks.run("restore", kill_after=chance.uniform(0, whole))
        killed += ended is None
        await forks.run("restore")
        assert describe(root) == saved
        assert not (tmp_path / "restoring" / WORKSPACE).exists()
    assert killed > _KILLS / 4
