"""Killed at any point, capturing and restoring never leave a version that is corrupt, or lose one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest

from bus.artifacts import DirectoryArtifacts
from bus.versions import Versions
from tests.integration.version_process import WORKSPACE, empty_state, read_state, write_state
from tests.unit.trees import describe

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

_KILLS = 30


async def _run(what: str, home: Path, *, kill_after: float | None = None) -> float | None:
    """Seconds from beginning to end; None when it was killed before."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.version_process", what, str(home)), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"begin\n"
    begin = time.monotonic()
    if kill_after is not None:
        await asyncio.sleep(kill_after)
        if child.returncode is None:
            child.send_signal(signal.SIGKILL)
    rest = await child.stdout.read()
    await child.wait()
    return time.monotonic() - begin if rest == b"done\n" else None


def _change(root: Path, chance: random.Random) -> None:
    for _ in range(60):
        path = root / f"d{chance.randrange(5)}" / f"f{chance.randrange(40)}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(chance.randrange(200_000)))


async def _check(home: Path, manifest: str | None, expected: dict[str, tuple[object, ...]], scratch: Path) -> None:
    scratch.mkdir()
    await Versions(DirectoryArtifacts(home / "store")).restore(manifest, scratch, None)
    assert describe(scratch) == expected


async def test_killed_while_capturing(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311
    root = tmp_path / "workspaces" / WORKSPACE
    root.mkdir(parents=True)
    write_state(tmp_path, empty_state())
    _change(root, chance)
    whole = await _run("capture", tmp_path)
    assert whole is not None
    saved, killed = describe(root), 0
    for number in range(_KILLS):
        _change(root, chance)
        before = read_state(tmp_path).manifest
        ended = await _run("capture", tmp_path, kill_after=chance.uniform(0, whole))
        killed += ended is None
        after = read_state(tmp_path).manifest
        if after != before:
            saved = describe(root)
        await _check(tmp_path, after, saved, tmp_path / f"check{number}")
    assert killed > _KILLS / 4
    await _run("capture", tmp_path)
    await _check(tmp_path, read_state(tmp_path).manifest, describe(root), tmp_path / "last")


async def test_killed_while_restoring(tmp_path: Path) -> None:
    chance = random.Random(6)  # noqa: S311
    root = tmp_path / "workspaces" / WORKSPACE
    root.mkdir(parents=True)
    write_state(tmp_path, empty_state())
    _change(root, chance)
    await _run("capture", tmp_path)
    state, saved = read_state(tmp_path), describe(root)
    whole, killed = 0.3, 0
    for number in range(_KILLS):
        _change(root, chance)  # what is there is of no use
        state = msgspec.structs.replace(state, epoch=number + 1)
        write_state(tmp_path, state)
        ended = await _run("restore", tmp_path, kill_after=chance.uniform(0, whole))
        killed += ended is None
        await _run("restore", tmp_path)
        assert describe(root) == saved
        assert not (tmp_path / "restoring" / WORKSPACE).exists()
    assert killed > _KILLS / 4
