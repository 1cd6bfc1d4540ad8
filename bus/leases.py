"""Taking a run from a worker that is gone, and reading what a run was started with."""

from __future__ import annotations

import msgspec

from bus import chunks
from bus.log import RUN, Log, Position
from helmr import events
from helmr.errors import NotFound
from helmr.events import Draft, RunEvent, RunSpec, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope


def spec_of(first: RunEvent) -> RunSpec:
    """What a run was started with, from its first event.

    Raises:
        NotFound: that event is gone: the run ended long ago, and is just being removed.
    """
    if "spec" not in first.data:
        raise NotFound(f"run {first.run_id} has been removed from the log")
    return msgspec.convert(first.data["spec"], RunSpec)


async def lose_lease(log: Log, scope: Scope, run_id: str, worker: str) -> Position[RunEvent]:
    """Take the run from ``worker``, which is gone: back to the queue, or to its end if the task asks for that.

    Its log says so, too. Nothing happens when the worker does not hold the run (any more).
    """
    spec = spec_of(await log.first(RUN, scope, run_id))
    held: RunState | None = None

    def decide(state: RunState) -> Draft | None:
        nonlocal held
        held = state if state.lease is not None and state.lease.worker == worker else None
        if held is None:
            return None
        return rules.abandon(state, spec, reason=f"worker {worker} was lost", began=True, at=events.now())

    position = await log.transact(RUN, scope, run_id, decide)
    if held is not None:
        await bury(log, scope, held)
    return position


async def bury(log: Log, scope: Scope, held: RunState) -> None:
    """Say in the log of the execution that ``held`` the run, its state under that lease, that it ends there."""
    await chunks.bury(log, scope, held.id, attempt=held.attempt or 1, dispatch=held.dispatch_attempt)
