"""The live workspaces of one worker: brought to life when they are needed, kept while they are used and a while longer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bus.log import WORKSPACE, Log
from bus.packs import Snapshot
from bus.versions import Versions
from helmr.errors import Conflict, HelmrError
from helmr.events import WorkspaceState
from helmr.models import Deployment
from helmr.subjects import Scope
from worker.captures import Captures, Occasion
from worker.checkouts import Checkouts, Record
from worker.claims import Claims
from worker.engine import Engine, Inheritance, Machine
from worker.fitting import Fitting
from worker.liveness import Liveness
from worker.machine_maker import MachineMaker, Needs
from worker.run_journal import STALE
from worker.sources import Sources

log = logging.getLogger(__name__)

#: Seconds a live workspace may idle before its machine is stopped (DESIGN: 5 min).
IDLE_STOP = 300.0
#: Seconds that making a version may take when a machine is stopped: the files stay on this host either way.
_LAST_CAPTURE = 20.0
#: Idle machines beyond this number are stopped, least recently used first.
MAX_IDLE = 16
#: Seconds that one too many may idle all the same: whoever comes right after shall have the processors.
_CALM = 0.5


class _Entry:
    """What is known of one workspace here."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.machine: Machine | None = None
        self.confirmed = 0.0  #: when the claim was last known to be ours
        self.sources: set[str] = set()  #: what was put into the machine
        self.fitting: set[str] = set()  #: fingerprints of sandboxes it may be used for, being as it is
        self.users = 0
        self.idle_since = 0.0
        self.watcher: asyncio.Task[None] | None = None
        self.capturing = asyncio.Lock()
        #: What was captured of its files last.
        self.record = Record(0, Snapshot())


class Machines:
    """Has each workspace claimed before its machine is made, and given up when it is stopped."""

    def __init__(
        self,
        log: Log,
        engine: Engine,
        sources: Sources,
        liveness: Liveness,
        versions: Versions,
        *,
        fitting: Fitting,
        worker_id: str,
        host: str,
        isolated: bool,
        group: str,
        idle_stop: float = IDLE_STOP,
        max_idle: int = MAX_IDLE,
    ) -> None:
        self._log = log
        self._engine = engine
        self._fitting = fitting
        self._maker = MachineMaker(engine, sources, worker_id=worker_id)
        self._claims = Claims(log, liveness, worker_id=worker_id, host=host, isolated=isolated, group=group)
        self._checkouts = Checkouts(engine, versions)
        self._captures = Captures(log, self._checkouts, worker_id)
        self._idle_stop = idle_stop
        self._max_idle = max_idle
        self._entries: dict[tuple[Scope, str], _Entry] = {}
        self._idle_changed = asyncio.Event()

    @asynccontextmanager
    async def use(self, scope: Scope, workspace_id: str, needs: Needs) -> AsyncIterator[Machine]:
        """A live machine for the length of a block.

        Raises:
            Misplaced: the workspace lives elsewhere.
            ImageError, EngineUnavailable, Unavailable: it cannot be brought to life.
        """
        entry = self._entries.setdefault((scope, workspace_id), _Entry())
        entry.users += 1
        try:
            async with entry.lock:
                if entry.machine is not None:
                    await self._confirm_claim(scope, workspace_id, entry)
                if entry.machine is None:
                    await self._bring_up(scope, workspace_id, needs, entry)
                elif needs.sandbox["fingerprint"] not in entry.fitting:
                    state = (await self._log.present(WORKSPACE, scope, workspace_id)).state
                    await self._check_fit(scope, state, needs, entry)
                machine = entry.machine
                if machine is None:
                    raise HelmrError(f"workspace {workspace_id} did not come up")
                if needs.deployment.content_hash not in entry.sources:
                    await self._maker.deliver(machine, needs.deployment)
                    entry.sources.add(needs.deployment.content_hash)
                    needs.over("source")
            yield machine
        finally:
            self._leave(entry)

    def _leave(self, entry: _Entry) -> None:
        entry.users -= 1
        entry.idle_since = asyncio.get_running_loop().time()
        self._idle_changed.set()

    @asynccontextmanager
    async def inherit(self, found: Inheritance) -> AsyncIterator[Scope | None]:
        """Keep a machine that a dead worker has left, if the log says that its workspace is live there; else it is ended.

        For the length of the block, which gets the scope of the workspace, it is in use. None: the machine is gone.
        """
        scope = await self._try_inherit(found)
        try:
            yield scope
        finally:
            if scope is not None:
                self._leave(self._entries[scope, found.machine.workspace_id])

    async def _try_inherit(self, found: Inheritance) -> Scope | None:
        machine = found.machine
        try:
            located = await self._log.find(WORKSPACE, "ws", machine.workspace_id)
            if located is not None:
                await self._inherit(located[0], found)
                return located[0]
        except HelmrError as error:
            log.info("workspace %s: its machine is not kept: %s", machine.workspace_id, error)
        await machine.stop(0)
        return None

    async def _inherit(self, scope: Scope, found: Inheritance) -> None:
        machine, workspace_id = found.machine, found.machine.workspace_id
        entry = self._entries.setdefault((scope, workspace_id), _Entry())
        async with entry.lock:
            state = await self._claims.inherit(scope, workspace_id, former=found.former, ref=machine.ref)
            machine.claimed(state.cursor)
            entry.record = await self._checkouts.ready(state, lambda _: None)
            entry.sources = machine.sources()
            entry.fitting = {state.fingerprint}
            entry.machine = machine
            entry.users += 1
            entry.confirmed = asyncio.get_running_loop().time()
            entry.watcher = asyncio.create_task(self._watch(scope, workspace_id, machine))

    @asynccontextmanager
    async def foreseen(self, scope: Scope, workspace_id: str) -> AsyncIterator[None]:
        """For the length of a block: :meth:`use` will most likely be called. What is new to us is claimed in the meantime."""
        if (scope, workspace_id) in self._entries:
            yield
            return
        async with self._claims.ahead(scope, workspace_id):
            yield

    def at_hand(self, scope: Scope, workspace_id: str, deployment: Deployment) -> bool:
        """Whether :meth:`use` would not have to wait for anything."""
        entry = self._entries.get((scope, workspace_id))
        if entry is None or entry.machine is None or entry.lock.locked() or not _is_fresh(entry):
            return False
        return deployment.content_hash in entry.sources

    async def capture(self, scope: Scope, workspace_id: str, occasion: Occasion) -> str | None:
        """Store what a live workspace has become as a version, if it has changed; why that is not possible, if so."""
        entry = self._entries.get((scope, workspace_id))
        if entry is None:
            return None  # it was stopped meanwhile, and captured then
        return await self._capture(scope, workspace_id, entry, occasion)

    async def _capture(self, scope: Scope, workspace_id: str, entry: _Entry, occasion: Occasion) -> str | None:
        async with entry.capturing:
            entry.record, problem = await self._captures.capture(scope, workspace_id, entry.record, occasion)
        return problem

    async def stop(self, scope: Scope, workspace_id: str, reason: str) -> None:
        """Stop a machine that nobody uses.

        Raises:
            Conflict: a run or an exec is in it.
        """
        entry = self._entries.get((scope, workspace_id))
        if entry is None:
            return
        async with entry.lock:
            if entry.users:
                hint = "wait for it, or end it: `helmr run cancel`, `helmr workspace exec kill`"
                raise Conflict(f"workspace {workspace_id} is in use: a run or an exec is in it", hint=hint)
            await self._shut_down(scope, workspace_id, entry, reason)
        if entry.machine is None and entry.users == 0 and self._entries.get((scope, workspace_id)) is entry:
            # Who still waits for the lock finds no machine; who comes later begins anew, from what is on disk.
            del self._entries[scope, workspace_id]

    async def delete(self, scope: Scope, workspace_id: str) -> None:
        """Remove the files of a workspace that the log says is deleted.

        Raises:
            Conflict: it is not.
        """
        state = (await self._log.present(WORKSPACE, scope, workspace_id)).state
        if state.status != "deleted":
            raise Conflict(f"workspace {workspace_id} is not deleted")
        await self._engine.delete(workspace_id)
        await self._checkouts.forget(workspace_id)

    async def stop_idle(self) -> None:
        """Stop machines that have idled too long, or are too many, for ever; run in a task of its own."""
        while True:
            self._idle_changed.clear()
            for key in self._due():
                with contextlib.suppress(Conflict):  # it has just come into use again
                    await self.stop(*key, "idle")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_due()):
                    await self._idle_changed.wait()
                    await asyncio.sleep(_CALM)

    async def stop_unused(self) -> None:
        """Stop every machine that nobody uses, however short its rest."""
        for _, key in self._idle():
            with contextlib.suppress(Conflict):  # it has just come into use again
                await self.stop(*key, "the worker takes nothing new")

    async def close(self) -> None:
        """Stop every machine, in use or not."""
        async with asyncio.TaskGroup() as group:
            for (scope, workspace_id), entry in list(self._entries.items()):
                group.create_task(self._shut_down(scope, workspace_id, entry, "worker stopped"))

    def _idle(self) -> list[tuple[float, tuple[Scope, str]]]:
        return sorted((e.idle_since, key) for key, e in self._entries.items() if e.machine is not None and e.users == 0)

    def _due(self) -> list[tuple[Scope, str]]:
        idle = self._idle()
        horizon = asyncio.get_running_loop().time() - self._idle_stop
        surplus = max(len(idle) - self._max_idle, 0)
        return [key for number, (since, key) in enumerate(idle) if since <= horizon or number < surplus]

    def _next_due(self) -> float | None:
        idle = self._idle()
        return idle[0][0] + self._idle_stop if idle else None

    async def _bring_up(self, scope: Scope, workspace_id: str, needs: Needs, entry: _Entry) -> None:
        state = await self._claims.claim(scope, workspace_id)
        entry.confirmed = asyncio.get_running_loop().time()
        needs.over("claim")
        try:
            entry.fitting.clear()
            await self._check_fit(scope, state, needs, entry)
            entry.record = await self._checkouts.ready(state, needs.progress)
            needs.over("files")
            entry.sources.clear()
            entry.machine = await self._maker.make(scope, workspace_id, state.cursor, needs)
            needs.over("adoption" if entry.machine.adopted else "container")
        except BaseException as error:
            await asyncio.shield(self._claims.give_up(scope, workspace_id, f"could not be brought to life: {error}"))
            raise
        entry.watcher = asyncio.create_task(self._watch(scope, workspace_id, entry.machine))
        taken = await self._confirm_claim(scope, workspace_id, entry)
        if taken is not None:
            raise self._claims.misplaced(taken)

    async def _check_fit(self, scope: Scope, state: WorkspaceState, needs: Needs, entry: _Entry) -> None:
        await self._fitting.check(scope, state, needs.sandbox)
        entry.fitting |= {state.fingerprint, needs.sandbox["fingerprint"]}

    async def _confirm_claim(self, scope: Scope, workspace_id: str, entry: _Entry) -> WorkspaceState | None:
        """End our machine if the workspace has been claimed by another worker meanwhile, and return how it is then.

        Nothing is looked up that is fresh. Whoever was stopped or cut off for a while may have been replaced: there must not be
        a second machine.
        """
        if _is_fresh(entry):
            return None
        now = asyncio.get_running_loop().time()
        taken = await self._claims.look(scope, workspace_id)
        if taken is None:
            entry.confirmed = now
            return None
        log.warning("workspace %s: another worker has it", workspace_id)
        await _end_machine(entry)
        return taken

    def files(self, workspace_id: str) -> Path:
        """The folder of this host that has the workspace's files."""
        return self._engine.files(workspace_id)

    async def _watch(self, scope: Scope, workspace_id: str, machine: Machine) -> None:
        """Forget a machine that ended by itself."""
        await self.forget(scope, workspace_id, machine, await machine.wait_lost())

    async def forget(self, scope: Scope, workspace_id: str, machine: Machine, reason: str) -> None:
        """Have the next user bring the workspace to life anew: this machine of it is lost. Saying so twice is fine."""
        entry = self._entries.get((scope, workspace_id))
        if entry is None:
            return  # it was stopped
        async with entry.lock:
            if entry.machine is machine:
                log.warning("workspace %s lost its machine: %s", workspace_id, reason)
                entry.machine = None
                await self._claims.give_up(scope, workspace_id, f"machine lost: {reason}")

    async def _shut_down(self, scope: Scope, workspace_id: str, entry: _Entry, reason: str) -> None:
        if await _end_machine(entry):
            await self._capture_at_last(scope, workspace_id, entry, reason)
            await self._claims.give_up(scope, workspace_id, reason)

    async def _capture_at_last(self, scope: Scope, workspace_id: str, entry: _Entry, reason: str) -> None:
        """What was changed since the end of the last run; without it the files are still here, for the next worker."""
        try:
            async with asyncio.timeout(_LAST_CAPTURE):
                await self._capture(scope, workspace_id, entry, Occasion(reason))
                await self._checkouts.save(workspace_id, entry.record)
        except (TimeoutError, HelmrError) as error:
            log.warning("workspace %s: no version was made at its stop: %s", workspace_id, error)


def _is_fresh(entry: _Entry) -> bool:
    """Whether the claim was known to be ours so lately that it need not be looked at again."""
    return asyncio.get_running_loop().time() - entry.confirmed <= STALE


async def _end_machine(entry: _Entry) -> bool:
    """Stop the machine, if there is one; whether there was."""
    machine, entry.machine = entry.machine, None
    if entry.watcher is not None:
        entry.watcher.cancel()
    if machine is not None:
        await machine.stop()
    return machine is not None
