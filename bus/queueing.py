"""The one way into a lane: whatever queues a run (a start, a retry, a wake-up, a lost worker) does it by what stands here.

A gate says whether a run may be dispatched now or is held until it is admitted (:mod:`bus.admission`). A run whose worker was
lost passes no gate: it keeps its slot and its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bus.log import RUN, WORKSPACE, Log, Position
from helmr.errors import NotFound
from helmr.events import Cause, Draft, Limit, RunEvent, RunState
from helmr.reducers import run as rules
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Scope

#: The lane of runs that any worker of the default group may take.
DEFAULT_GROUP = "default"


class Applicant(Protocol):
    """What a gate looks at; both a run's spec and its state will do."""

    @property
    def deployment_id(self) -> str: ...
    @property
    def queue(self) -> str | None: ...
    @property
    def concurrency_key(self) -> str | None: ...


#: What holds the run (scope, id, run) back from a lane; None: nothing does, and it is counted in.
Gate = Callable[[Scope, str, Applicant, str], Limit | None]


def is_group(lane: str) -> bool:
    """Whether a lane belongs to a group of workers, rather than to one worker or one host."""
    return lane[0] not in "@~"


async def enqueue(
    log: Log,
    scope: Scope,
    run_id: str,
    *,
    cause: Cause,
    alive: set[str],
    gate: Gate,
    group: str = DEFAULT_GROUP,
    known: Position[RunEvent] | None = None,
) -> Position[RunEvent]:
    """Queue a run that was woken or is to be retried. Nothing happens when that has been done already.

    ``known`` is the run's last event, if it has just been read or written.

    Raises:
        NotFound: there is no such run.
    """
    position = known or await log.last(RUN, scope, run_id)
    if position.event is None:
        raise NotFound(f"no run {run_id} in {scope}")
    lane = await _lane(log, scope, position.event.state.workspace_id, group=group, alive=alive)

    def decide(state: RunState) -> Draft | None:
        if state.status != "queued" or state.dispatch is not None:
            return None
        return rules.requeue(state, cause=cause, lane=lane, limit=gate(scope, run_id, state, lane))

    return await log.transact(RUN, scope, run_id, decide, known=position)


async def redispatch(log: Log, scope: Scope, run_id: str, *, dispatch: int | None, lane: str) -> Position[RunEvent]:
    """Queue a run again whose dispatch message (that with cursor ``dispatch``) can no longer be used.

    Nothing happens when the run has moved on by itself.
    """

    def decide(state: RunState) -> Draft | None:
        if state.status != "queued" or state.dispatch != dispatch:
            return None
        return rules.requeue(state, cause="redispatch", lane=lane)

    return await log.transact(RUN, scope, run_id, decide)


async def admit(log: Log, scope: Scope, run_id: str, *, held: int, lane: str, alive: set[str]) -> bool:
    """Dispatch a run that is held since its event ``held``; False when somebody else has done it before.

    ``lane`` is where it was bound for then. Any worker of a group may still have it, and so may a worker that is alive; else
    it is looked up again.

    Raises:
        NotFound: there is no such run.
    """
    if not is_group(lane) and lane[1:] not in alive:
        lane = await lane_of(log, scope, run_id, group=DEFAULT_GROUP, alive=alive)
    late = False

    def decide(state: RunState) -> Draft | None:
        nonlocal late
        draft = rules.admit(state, held=held, lane=lane)
        late = draft is None and not state.terminal
        return draft

    await log.transact(RUN, scope, run_id, decide)
    return not late


async def lane_of(log: Log, scope: Scope, run_id: str, *, group: str, alive: set[str]) -> str:
    """Where a run can be executed: see :func:`helmr.reducers.workspace.lane`."""
    run = await log.present(RUN, scope, run_id)
    return await _lane(log, scope, run.state.workspace_id, group=group, alive=alive)


async def _lane(log: Log, scope: Scope, workspace_id: str, *, group: str, alive: set[str]) -> str:
    workspace = await log.last(WORKSPACE, scope, workspace_id)
    return workspace_rules.lane(workspace.state, group=group, alive=alive)
