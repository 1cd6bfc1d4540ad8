"""Finds out what there is to say about a run: from the log, the live runs and the presence of workers."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from bus import topology
from bus.admission import Admission
from bus.explanation import Situation, explain
from bus.held import pool_of
from bus.leases import spec_of
from bus.live import LiveRun
from bus.log import QUEUE, RUN, Log
from bus.presence import Presence
from bus.stored import get_message
from helmr import events, subjects
from helmr.events import RunEvent, RunState
from helmr.explanation import Explanation
from helmr.models import QueueHolder, run_record
from helmr.reducers import queue as queue_rules
from helmr.reducers.queue import Limits
from helmr.subjects import Scope

#: The kinds of which the latest event is looked at.
_KINDS = {"lost": "lease_lost", "retry": "retry_scheduled", "started": "started", "cancel": "cancel_requested"}


class Explainer:
    """Explains runs on behalf of one control process."""

    def __init__(self, log: Log, admission: Admission, presence: Presence) -> None:
        self.log = log
        self.admission = admission
        self.presence = presence

    async def explain(self, scope: Scope, run_id: str) -> Explanation:
        """What a run is doing or why it is not.

        Raises:
            NotFound: the log has no such run (any more).
        """
        last = await self.log.present(RUN, scope, run_id)
        first = await self.log.first(RUN, scope, run_id) if last.cursor > 1 else last
        run = run_record(*scope, spec_of(first), last)
        facts: dict[str, Any] = {"now": events.now(), "run": run, "last": last}
        if not last.state.terminal:
            facts |= await self._latest(scope, run_id)
            facts |= self._lane(last.state)
            if last.state.hold is not None:
                facts |= await self._hold(scope, last)
            if last.state.lease is not None:
                facts["holder"] = self.presence.alive().get(last.state.lease.worker)
                facts["note"] = await self._note(scope, run_id, last.attempt or 1)
        return explain(Situation(**facts))

    async def _latest(self, scope: Scope, run_id: str) -> dict[str, RunEvent | None]:
        async def read(kind: str) -> RunEvent | None:
            found = await get_message(self.log.js, topology.RUNS, subjects.event(scope, "run", run_id, kind))
            return RUN.decode(found[1]) if found else None

        return dict(zip(_KINDS, await asyncio.gather(*map(read, _KINDS.values())), strict=True))

    def _lane(self, state: RunState) -> dict[str, Any]:
        lane, lanes = state.lane or "", self.admission.lanes
        own = self.admission.live.get(state.id)
        in_lane = [run for run in self.admission.live if run.in_lane == lane]
        return {
            "workers": self.presence.workers(lane),
            "lane_waiting": lanes.waiting(lane),
            "lane_most": lanes.most(lane),
            "before": sum(1 for run in in_lane if own is not None and run.seq < own.seq),
        }

    async def _hold(self, scope: Scope, last: RunEvent) -> dict[str, Any]:
        state, own = last.state, self.admission.live.get(last.run_id)
        pool = pool_of(own) if own is not None else None
        order = self.admission.held.pool(pool) if pool is not None else None
        facts: dict[str, Any] = {}
        if order is not None and state.id in order:
            facts["ahead"] = order.ahead(state.id)
        if state.queue is None or state.hold is None or state.hold.limit != "queue":
            return facts
        limits = self.admission.limits(scope, state.queue, state.deployment_id)
        granted = (await self.log.last(QUEUE, scope, state.queue)).state
        executing = self.admission.executing((scope, state.queue))
        others = [key for run_id, key in executing.items() if granted is None or run_id not in granted.holders]
        room = queue_rules.Room(granted, limits, others=others)
        holders = [
            _holder(run, key)
            for run_id, key in executing.items()
            if (run := self.admission.live.get(run_id)) is not None and _shares(limits, key, state.concurrency_key)
        ]
        holders.sort(key=lambda holder: holder.since)
        return facts | {"limits": limits, "holders": holders, "full": not room.fits(state.concurrency_key)}

    async def _note(self, scope: Scope, run_id: str, attempt: int) -> str | None:
        """What the worker said last about the workspace, in the run's log."""
        found = await get_message(self.log.js, topology.LOGS, subjects.log(scope, run_id, attempt, "log"))
        for line in reversed((found[1] if found else b"").splitlines()):
            try:
                record = msgspec.json.decode(line, type=_Note)
            except msgspec.DecodeError:
                continue  # the task's own lines may be anything
            if record.fields.get("source") == "helmr":
                return record.message
        return None


class _Note(msgspec.Struct):
    message: str = ""
    fields: dict[str, Any] = {}


def _holder(run: LiveRun, key: str | None) -> QueueHolder:
    return QueueHolder(run_id=run.id, concurrency_key=key, status=run.state.status, since=run.at, worker=run.holder)


def _shares(limits: Limits, theirs: str | None, own: str | None) -> bool:
    """Whether a run with key ``theirs`` can be what keeps one with key ``own`` out."""
    return limits.total is not None or theirs == own
