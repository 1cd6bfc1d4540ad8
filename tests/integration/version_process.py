"""Captures or restores one workspace in forked processes, for tests that kill them at any point.

Each line of the standard input is ``capture|restore HOME SECONDS``, with ``-`` for a process that is left alone; each is
answered with the exit code (negative for a signal) and the seconds it took. The workspace's state is the file ``state`` in
HOME: what the log would have.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import time
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


async def _live(what: str, home: Path) -> None:
    checkouts = Checkouts(ProcessEngine(home), Versions(DirectoryArtifacts(home / "store")))
    if what == "capture":
        await _capture(home, checkouts)
    else:
        await checkouts.ready(read_state(home), lambda _: None)


def _run(what: str, home: Path, kill_after: float | None) -> str:
    """Fork a process that does it; how that ended, and after how many seconds."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            asyncio.run(_live(what, home))
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        handle = os.pidfd_open(child)
        select.select([handle], [], [], kill_after)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    _, status = os.waitpid(child, 0)
    return f"{os.waitstatus_to_exitcode(status)} {time.monotonic() - begin}"


def main() -> None:
    """Do what each line of the standard input asks for."""
    for line in sys.stdin:
        what, home, kill_after = line.split()
        print(_run(what, Path(home), float(kill_after) if kill_after != "-" else None), flush=True)  # noqa: T201


if __name__ == "__main__":
    die_with_parent()
    main()
