"""Asking about queues: limits, slots in use, and who waits; answered from the live runs and the log, without the projector."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches

import msgspec

from bus.admission import Admission
from bus.deployments import Deployments
from bus.live import LiveRun
from bus.log import QUEUE, Log
from bus.services.deployments import NoArguments
from bus.services.endpoint import Endpoint
from helmr.errors import NotFound
from helmr.models import Queue, QueueHolder, QueueLoad
from helmr.subjects import Scope

#: Concurrency keys in one answer, those with most runs first.
_MAX_KEYS = 1000


class QueueRef(msgspec.Struct, kw_only=True):
    """A request that names a queue."""

    name: str


class Queues:
    """The queue service."""

    def __init__(self, log: Log, deployments: Deployments, admission: Admission) -> None:
        self.log = log
        self.deployments = deployments
        self.admission = admission

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("queue", "list", NoArguments, self.every),
            Endpoint("queue", "get", QueueRef, self.get),
        ]

    async def every(self, scope: Scope, _request: NoArguments) -> list[Queue]:
        """The queues that are declared, and those that have live runs; without holders and keys."""
        waiting = self._waiting(scope)
        return [
            msgspec.structs.replace(await self._describe(scope, name, waiting.get(name, [])), keys=[], holders=[])
            for name in sorted(self._names(scope))
        ]

    async def get(self, scope: Scope, request: QueueRef) -> Queue:
        """One queue.

        Raises:
            NotFound: no deployment of late has declared it, and no live run is in it.
        """
        names = self._names(scope)
        if request.name not in names:
            close = get_close_matches(request.name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"queues: {', '.join(sorted(names)) or 'none'}"
            raise NotFound(f"no queue {request.name!r} in {scope}", hint=hint)
        return await self._describe(scope, request.name, self._waiting(scope).get(request.name, []))

    def _names(self, scope: Scope) -> set[str]:
        live = {run.state.queue for run in self.admission.live if run.scope == scope and run.state.queue is not None}
        return live | {name for place, name in self.deployments.queues() if place == scope}

    def _waiting(self, scope: Scope) -> dict[str, list[LiveRun]]:
        found: dict[str, list[LiveRun]] = {}
        for run in self.admission.live:
            if run.scope == scope and run.state.hold is not None and run.state.queue is not None:
                found.setdefault(run.state.queue, []).append(run)
        return found

    async def _describe(self, scope: Scope, name: str, waiting: list[LiveRun]) -> Queue:
        declared = self.deployments.queue(scope, name)
        holders = await self._holders(scope, name)
        granted = {holder.run_id for holder in holders}
        waiting = [run for run in waiting if run.id not in granted]
        return Queue(
            name=name,
            project=scope.project,
            environment=scope.environment,
            declared=declared is not None,
            concurrency=declared.get("concurrency") if declared else None,
            concurrency_per_key=declared.get("concurrency_per_key") if declared else None,
            in_use=len(holders),
            waiting=len(waiting),
            oldest_waiting_at=min((run.state.queued_at or run.at for run in waiting), default=None),
            keys=_loads(holders, waiting),
            holders=holders,
        )

    async def _holders(self, scope: Scope, name: str) -> list[QueueHolder]:
        """Who has a slot, as the log says now; and who executes without needing one."""
        state = (await self.log.last(QUEUE, scope, name)).state
        live = self.admission.live
        found = []
        for run_id, grant in (state.holders if state else {}).items():
            run = live.get(run_id)
            if run is not None:  # else it has just ended
                found.append(_holder(run, grant.key, grant.at))
        known = {holder.run_id for holder in found}
        for run_id, key in self.admission.executing((scope, name)).items():
            run = live.get(run_id)
            if run is not None and run_id not in known:
                found.append(_holder(run, key, run.at))
        return sorted(found, key=lambda holder: (holder.since, holder.run_id))


def _holder(run: LiveRun, key: str | None, since: object) -> QueueHolder:
    told = {"run_id": run.id, "concurrency_key": key, "status": run.state.status, "since": since, "worker": run.holder}
    return msgspec.convert(told, QueueHolder)


def _loads(holders: list[QueueHolder], waiting: list[LiveRun]) -> list[QueueLoad]:
    used = Counter(holder.concurrency_key for holder in holders)
    held = Counter(run.state.concurrency_key for run in waiting)
    loads = [QueueLoad(concurrency_key=key, in_use=used[key], waiting=held[key]) for key in used | held]
    loads.sort(key=lambda load: (-load.in_use - load.waiting, load.concurrency_key or ""))
    return loads[:_MAX_KEYS]
