"""Turning a dispatch message into a lease: the compare-and-set that decides who executes a run."""

from __future__ import annotations

from bus import topology
from bus.leases import lose_lease
from bus.log import RUN, Log, Position
from bus.pull import Delivery
from bus.stored import Superseded
from bus.timers import cancel_header
from helmr.errors import Conflict
from helmr.events import Draft, RunEvent, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope
from worker.liveness import Liveness


class Stale(Exception):
    """The message leads to nothing any more: acknowledge it."""


class Held(Exception):
    """A worker that is alive executes the run: leave the message alone."""

    def __init__(self, worker: str) -> None:
        super().__init__(f"held by {worker}")
        self.worker = worker


async def take_lease(
    log: Log,
    liveness: Liveness,
    scope: Scope,
    item: Delivery,
    dispatched: RunEvent,
    *,
    worker: str,
    execution: int = 0,
) -> Position[RunEvent]:
    """Lease the run of a dispatch message for ``worker``; returns the position of the ``leased`` event.

    ``execution``: whose process the worker has kept for the run; see :func:`helmr.reducers.run.lease`.

    Raises:
        Stale: the run has moved on, or has been dispatched too often (and has failed now).
        Held: it is being executed.
    """
    run_id = dispatched.run_id
    # A first delivery was just stored: its own sequence is the expected one, and no read is needed.
    position = Position(item.stream_seq, dispatched)
    if item.delivered > 1:
        position = await log.last(RUN, scope, run_id)
    while True:
        state = position.state
        if state is None or state.terminal or state.dispatch != dispatched.cursor:
            raise Stale(run_id)
        if state.lease is not None:
            await _outlive(log, liveness, scope, run_id, state.lease.worker, worker=worker)
        else:
            try:
                draft = rules.lease(state, worker=worker, dispatch=dispatched.cursor, execution=execution)
                return await _append(log, scope, position, draft)
            except Superseded:
                pass
            except Conflict as error:
                raise Stale(run_id) from error
        position = await log.last(RUN, scope, run_id)


async def _append(log: Log, scope: Scope, position: Position[RunEvent], draft: Draft) -> Position[RunEvent]:
    state: RunState = position.state
    headers = cancel_header(scope, state.id, "ttl") if state.ttl is not None else None
    return await log.append(RUN, scope, state.id, position, draft, headers=headers)


async def _outlive(log: Log, liveness: Liveness, scope: Scope, run_id: str, holder: str, *, worker: str) -> None:
    """A run that somebody holds was delivered again: take it from a holder that is gone."""
    if holder == worker or not await liveness.confirm_gone(holder):
        raise Held(holder)
    await lose_lease(log, scope, run_id, holder)


#: Seconds before a message whose run is being executed elsewhere is looked at again.
LOOK_AGAIN = topology.HEARTBEAT
