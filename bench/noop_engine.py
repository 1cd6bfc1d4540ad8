"""An engine that executes nothing: its tasks wait for a record of ``notes``, and have succeeded when they are executed again.

With it a whole worker can be measured at ten thousand runs, on a machine that has no room for ten thousand interpreters.
"""

# ruff: noqa: ARG002  # the arguments are those of the interface, and there is nothing to do about them

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from worker.engine import (
    BuildSecrets,
    EngineInfo,
    Exited,
    Frame,
    ImageSpec,
    Inheritance,
    Machine,
    MachineSpec,
    Message,
    Process,
    ProcessSpec,
    Progress,
    Terminal,
)

_WAIT = {"op": "wait", "id": 1, "name": "notes", "n": 1, "main": True, "kind": "stream", "stream": "notes"}


class NoopProcess:
    """A task that says what the real one would (:class:`worker.engine.Process`)."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.id = spec.id
        self._woken = bool(spec.task["journal"])
        self._cancelled = asyncio.Event()

    async def frames(self) -> AsyncIterator[Frame]:
        """It waits, or it was woken and is done."""
        if self._cancelled.is_set():
            yield Exited(cause="cancel")
            return
        yield Message({"op": "started"})
        if self._woken:
            yield Message({"op": "result", "output": None})
            yield Exited(exit_code=0)
            return
        yield Message(_WAIT)
        await self._cancelled.wait()
        yield Exited(cause="cancel")

    async def send(self, body: dict[str, Any]) -> None:
        """Nobody listens: it is never kept for long enough to be told anything."""

    def feed(self, data: bytes) -> None:
        """It reads nothing."""

    at = 0
    backlog = 0.0

    def settle_by_hand(self) -> None:
        """Nothing is kept."""

    def settle_as_taken(self) -> None:
        """Nothing is kept."""

    def settle(self, sequence: int) -> None:
        """Nothing is kept."""

    def end_input(self) -> None:
        """It has none."""

    def on_taken(self, listener: Callable[[int], None]) -> None:
        """It takes nothing."""

    def resize(self, size: Terminal) -> None:
        """It has no terminal."""

    def signal(self, number: int) -> None:
        """It hears nothing but its cancel."""

    async def limit(self, deadline: float, grace: float) -> None:
        """It takes no time."""

    async def cancel(self, grace: float) -> None:
        """It ends at once."""
        self._cancelled.set()


class NoopMachine:
    """A workspace that is live by name only (:class:`worker.engine.Machine`)."""

    def __init__(self, workspace_id: str) -> None:
        self.workspace_id = workspace_id
        self.ref = "none"
        self.adopted = False
        self._stopped = asyncio.Event()

    def sources(self) -> set[str]:
        """None: nothing is executed."""
        return set()

    def claimed(self, claim: int) -> None:
        """Nothing is kept."""

    async def put_source(self, name: str, tree: Path) -> None:
        """Nothing is executed."""

    async def start(self, spec: ProcessSpec) -> Process:
        """A process that is none."""
        return NoopProcess(spec)

    async def stop(self, grace: float = 2.0) -> None:
        """It is live no more."""
        self._stopped.set()

    async def wait_lost(self) -> str:
        """Return when it was stopped."""
        await self._stopped.wait()
        return "stopped"


class NoopEngine:
    """Makes such machines (:class:`worker.engine.Engine`); ``home`` has an empty folder for each workspace."""

    name = "none"
    owner = None

    def __init__(self, home: Path) -> None:
        self._home = home

    def files(self, workspace_id: str) -> Path:
        """The folder of a workspace."""
        return self._home / workspace_id

    async def check(self) -> EngineInfo:
        """It always works."""
        return EngineInfo(name=self.name, version="0", host="host_bench", isolated=False)

    def retire(self, owner: str, source: str) -> None:
        """Nothing is started ahead."""

    def guard(self, servers: tuple[tuple[str, int], ...]) -> None:
        """There is nothing to be kept away."""

    async def ensure_image(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:
        """Nothing is built."""
        return "none"

    async def materialize(self, spec: MachineSpec) -> Machine:
        """A machine at once."""
        self.files(spec.workspace_id).mkdir(parents=True, exist_ok=True)
        return NoopMachine(spec.workspace_id)

    async def delete(self, workspace_id: str) -> None:
        """Its folder goes with the bench's."""

    async def inherit(self, worker_id: str, living: set[str]) -> list[Inheritance]:
        """Nothing outlives its worker."""
        return []

    async def collect(self, live_workers: set[str], *, spare_running: bool = False) -> list[str]:
        """Nothing is left by anybody."""
        return []

    async def close(self) -> None:
        """Nothing is held."""
