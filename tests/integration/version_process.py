"""Captures or restores one workspace as a process of its own, for tests that kill it at any point.

``python -m tests.integration.version_process capture|restore HOME`` says ``begin`` when it begins, and ``done`` at the end. The
workspace's state is the file ``state`` in HOME: what the log would have.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from bus.artifacts import DirectoryArtifacts
from bus.server import die_with_parent
from bus.versions import Captured, Versions
from helmr import events
from helmr.events import WorkspaceState
from worker.checkouts import Checkouts, Record
from worker.process_engine import ProcessEngine

WORKSPACE = "ws_1"


def empty_state() -> WorkspaceState:
    """A workspace that has never been captured."""
    at = events.now()
    return WorkspaceState(id=WORKSPACE, status="active", cursor=1, sandbox="s", created_at=at, updated_at=at)


def read_state(home: Path) -> WorkspaceState:
    """The workspace, as the log would have it."""
    return msgspec.json.decode((home / "state").read_bytes(), type=WorkspaceState)


def write_state(home: Path, state: WorkspaceState) -> None:
    """Change it, in one step, as an append to the log is."""
    draft = home / "state.new"
    draft.write_bytes(msgspec.json.encode(state))
    draft.replace(home / "state")


async def _capture(home: Path, checkouts: Checkouts) -> None:
    state = read_state(home)
    record = await checkouts.ready(state, lambda _: None)
    captured = await checkouts.capture(WORKSPACE, record)
    if isinstance(captured, Captured):
        write_state(home, msgspec.structs.replace(state, manifest=captured.facts.manifest))
        await checkouts.save(WORKSPACE, Record(state.epoch, captured.snapshot))


async def main(what: str, home: Path) -> None:
    """Do it."""
    checkouts = Checkouts(ProcessEngine(home), Versions(DirectoryArtifacts(home / "store")))
    os.write(1, b"begin\n")
    if what == "capture":
        await _capture(home, checkouts)
    else:
        await checkouts.ready(read_state(home), lambda _: None)
    os.write(1, b"done\n")


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
