"""The live workspaces of one worker: each claimed in the log before its container exists, and given up in the log after.

The claim is what keeps two workers from bringing one workspace to life twice: the loser of the compare-and-set learns where
the workspace is, and sends the run there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bus.log import WORKSPACE, Log, Position
from bus.packs import Snapshot
from bus.versions import Versions
from helmr.errors import Conflict, HelmrError
from helmr.events import Draft, WorkspaceEvent, WorkspaceState
from helmr.models import Deployment
from helmr.reducers import workspace as rules
from helmr.subjects import Scope
from worker.captures import Captures, Occasion
from worker.checkouts import Checkouts, Record
from worker.engine import (
    BuildSecrets,
    Engine,
    ImageGone,
    ImageSpec,
    Inheritance,
    Limits,
    Machine,
    MachineSpec,
    Network,
    Provision,
    Template,
)
from worker.liveness import Liveness
from worker.run_journal import STALE
from worker.sources import Sources

log = logging.getLogger(__name__)

#: Seconds a live workspace may idle before its machine is stopped (DESIGN: 5 min).
IDLE_STOP = 300.0
#: Seconds that making a version may take when a machine is stopped: the files stay on this host either way.
_LAST_CAPTURE = 20.0
#: Idle machines beyond this number are stopped, least recently used first.
MAX_IDLE = 16


class Misplaced(Exception):
    """The workspace is, or its files are, somewhere this worker cannot use them; ``lane`` is where the run belongs."""

    def __init__(self, lane: str) -> None:
        super().__init__(f"the run belongs in lane {lane}")
        self.lane = lane


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


class _Entry:
    """What is known of one workspace here."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.machine: Machine | None = None
        self.confirmed = 0.0  #: when the claim was last known to be ours
        self.sources: set[str] = set()  #: what was put into the machine
        self.users = 0
        self.idle_since = 0.0
        self.watcher: asyncio.Task[None] | None = None
        self.capturing = asyncio.Lock()
        #: What was captured of its files last.
        self.record = Record(0, Snapshot())


class Machines:
    """Brings workspaces to life, keeps them while they are used and a while longer, and stops them."""

    def __init__(
        self,
        log: Log,
        engine: Engine,
        sources: Sources,
        liveness: Liveness,
        versions: Versions,
        *,
        worker_id: str,
        host: str,
        isolated: bool,
        group: str,
        idle_stop: float = IDLE_STOP,
        max_idle: int = MAX_IDLE,
    ) -> None:
        self._log = log
        self._engine = engine
        self._sources = sources
        self._liveness = liveness
        self._worker_id = worker_id
        self._host = host
        self._isolated = isolated
        self._checkouts = Checkouts(engine, versions)
        self._captures = Captures(log, self._checkouts, worker_id)
        self._group = group
        self._idle_stop = idle_stop
        self._max_idle = max_idle
        self._entries: dict[tuple[Scope, str], _Entry] = {}
        self._idle_changed = asyncio.Event()
        self._foreseen: dict[tuple[Scope, str], asyncio.Task[Position[WorkspaceEvent]]] = {}

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
                machine = entry.machine
                if machine is None:
                    raise HelmrError(f"workspace {workspace_id} did not come up")
                digest = needs.deployment.content_hash
                if digest not in entry.sources:
                    await machine.put_source(digest, await self._sources.tree(needs.deployment))
                    entry.sources.add(digest)
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
            state: WorkspaceState = (
                await self._log.transact(
                    WORKSPACE,
                    scope,
                    workspace_id,
                    lambda state: rules.inherit(
                        state, worker=self._worker_id, former=found.former, host=self._host, ref=machine.ref
                    ),
                )
            ).state
            machine.claimed(state.cursor)
            entry.record = await self._checkouts.ready(state, lambda _: None)
            entry.sources = machine.sources()
            entry.machine = machine
            entry.users += 1
            entry.confirmed = asyncio.get_running_loop().time()
            entry.watcher = asyncio.create_task(self._watch(scope, workspace_id, machine))

    @contextlib.contextmanager
    def foreseen(self, scope: Scope, workspace_id: str) -> Iterator[None]:
        """For the length of a block: :meth:`use` will be called, and what it has to know can be read in the meantime."""
        entry = self._entries.get((scope, workspace_id))
        if (entry is not None and entry.machine is not None) or (scope, workspace_id) in self._foreseen:
            yield
            return
        reading = asyncio.create_task(self._log.last(WORKSPACE, scope, workspace_id))
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._foreseen[scope, workspace_id] = reading
        try:
            yield
        finally:
            if self._foreseen.get((scope, workspace_id)) is reading:
                del self._foreseen[scope, workspace_id]
            reading.cancel()

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
        state = await self._claim(scope, workspace_id)
        claim = state.cursor
        entry.confirmed = asyncio.get_running_loop().time()
        needs.over("claim")
        try:
            entry.record = await self._checkouts.ready(state, needs.progress)
            needs.over("files")
            entry.sources.clear()
            try:
                entry.machine = await self._make(scope, workspace_id, claim, needs)
            except ImageGone:
                entry.machine = await self._make(scope, workspace_id, claim, needs)
            needs.over("adoption" if entry.machine.adopted else "container")
        except BaseException as error:
            await asyncio.shield(self._give_up(scope, workspace_id, f"could not be brought to life: {error}"))
            raise
        entry.watcher = asyncio.create_task(self._watch(scope, workspace_id, entry.machine))
        taken = await self._confirm_claim(scope, workspace_id, entry)
        if taken is not None:
            raise Misplaced(self._lane(taken))

    async def _confirm_claim(self, scope: Scope, workspace_id: str, entry: _Entry) -> WorkspaceState | None:
        """End our machine if the workspace has been claimed by another worker meanwhile, and return how it is then.

        Nothing is looked up that is fresh. Whoever was stopped or cut off for a while may have been replaced: there must not be
        a second machine.
        """
        if _is_fresh(entry):
            return None
        now = asyncio.get_running_loop().time()
        state = (await self._log.present(WORKSPACE, scope, workspace_id)).state
        if state.materialization is not None and state.materialization.worker == self._worker_id:
            entry.confirmed = now
            return None
        log.warning("workspace %s: another worker has it", workspace_id)
        await _end_machine(entry)
        return state

    def _lane(self, state: WorkspaceState) -> str:
        return rules.lane(state, group=self._group, alive=self._liveness.alive())

    async def _claim(self, scope: Scope, workspace_id: str) -> WorkspaceState:
        def decide(state: WorkspaceState) -> Draft:
            live = state.materialization
            gone = live.worker if live and not self._liveness.is_alive(live.worker) else None
            return rules.materialize(
                state, worker=self._worker_id, host=self._host, ref="", evict=gone, isolated=self._isolated
            )

        foreseen = self._foreseen.pop((scope, workspace_id), None)
        read = await foreseen if foreseen is not None else None
        known = read if read is not None and read.event is not None else None
        try:
            position = await self._log.transact(WORKSPACE, scope, workspace_id, decide, known=known)
        except Conflict as error:
            if known is not None:  # what was read ahead may be old
                return await self._claim(scope, workspace_id)
            state = (await self._log.present(WORKSPACE, scope, workspace_id)).state
            if state.status == "deleted":
                raise
            raise Misplaced(self._lane(state)) from error
        claimed: WorkspaceState = position.state
        return claimed

    def files(self, workspace_id: str) -> Path:
        """The folder of this host that has the workspace's files."""
        return self._engine.files(workspace_id)

    async def _image(self, needs: Needs) -> ImageSpec:
        image = needs.sandbox["image"]
        steps = tuple(tuple(str(part) for part in step) for step in image["steps"])
        needs_context = any(step[0] == "copy" for step in steps)
        context = await self._sources.tree(needs.deployment) if needs_context else None
        return ImageSpec(base=image["base"], steps=steps, context=context)

    async def _make(self, scope: Scope, workspace_id: str, claim: int, needs: Needs) -> Machine:
        image = await self._engine.ensure_image(await self._image(needs), needs.progress, needs.secrets)
        needs.over("image")
        provision = await self._provision(scope, needs)
        return await self._engine.materialize(self._spec(workspace_id, claim, image, needs.sandbox, provision))

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
                await self._give_up(scope, workspace_id, f"machine lost: {reason}")

    async def _shut_down(self, scope: Scope, workspace_id: str, entry: _Entry, reason: str) -> None:
        if await _end_machine(entry):
            await self._capture_at_last(scope, workspace_id, entry, reason)
            await self._give_up(scope, workspace_id, reason)

    async def _capture_at_last(self, scope: Scope, workspace_id: str, entry: _Entry, reason: str) -> None:
        """What was changed since the end of the last run; without it the files are still here, for the next worker."""
        try:
            async with asyncio.timeout(_LAST_CAPTURE):
                await self._capture(scope, workspace_id, entry, Occasion(reason))
                await self._checkouts.save(workspace_id, entry.record)
        except (TimeoutError, HelmrError) as error:
            log.warning("workspace %s: no version was made at its stop: %s", workspace_id, error)

    async def _give_up(self, scope: Scope, workspace_id: str, reason: str) -> None:
        try:
            await self._log.transact(
                WORKSPACE, scope, workspace_id, lambda state: rules.stop(state, worker=self._worker_id, reason=reason)
            )
        except HelmrError as error:
            # Presence will tell the others that we are gone; the claim can then be evicted.
            log.warning("workspace %s: cannot say that it is stopped: %s", workspace_id, error)


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


def _policy(network: str | list[str]) -> Network:
    """The network policy of an index; what is not understood is no network."""
    if isinstance(network, str):
        return "internet" if network == "internet" else "none"
    return tuple(network)
