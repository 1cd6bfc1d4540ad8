"""The runs that have not ended, answered from memory: for those who go on by following events."""

from __future__ import annotations

import asyncio
import heapq

import msgspec

from bus.live import LiveRun as Known
from bus.live import LiveRuns
from bus.services.endpoint import Endpoint
from helmr.errors import Unavailable, UsageError
from helmr.models import LiveRun
from helmr.subjects import Scope

#: Seconds to wait for the live runs to be complete after a start.
_PATIENCE = 5.0
_MAX_LIMIT = 2000


class LiveRequest(msgspec.Struct, kw_only=True):
    """A page of live runs in the order of their ids, those beyond ``after``."""

    after: str = ""
    limit: int = 1000


class LivePage(msgspec.Struct, kw_only=True):
    """Live runs; ``next`` is ``after`` for the next page, None at the end."""

    runs: list[LiveRun]
    next: str | None


class Live:
    """The service over control's live runs."""

    def __init__(self, live: LiveRuns, ready: asyncio.Event) -> None:
        self._live = live
        self._ready = ready

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [Endpoint("run", "live", LiveRequest, self.page)]

    async def page(self, scope: Scope, request: LiveRequest) -> LivePage:
        """A page of live runs.

        Raises:
            Unavailable: control has just started, and does not know them all yet.
        """
        if not 1 <= request.limit <= _MAX_LIMIT:
            raise UsageError(f"limit is {request.limit}, not 1 to {_MAX_LIMIT}")
        try:
            await asyncio.wait_for(self._ready.wait(), _PATIENCE)
        except TimeoutError:
            raise Unavailable("control is still reading which runs are live", hint="ask again in a moment") from None
        mine = (run for run in self._live if run.scope == scope and run.id > request.after)
        found = heapq.nsmallest(request.limit + 1, mine, key=lambda run: run.id)
        more = len(found) > request.limit
        kept = found[: request.limit]
        return LivePage(runs=[_record(run) for run in kept], next=kept[-1].id if more else None)


def _record(run: Known) -> LiveRun:
    state = run.state
    return LiveRun(
        id=state.id,
        status=state.status,
        cursor=state.cursor,
        task_id=state.task_id,
        queue=state.queue,
        held_by=state.hold.limit if state.hold is not None else None,
        attempt=state.attempt,
        worker=run.holder,
        leased_at=state.lease.at if state.lease is not None else None,
        created_at=state.created_at,
    )
