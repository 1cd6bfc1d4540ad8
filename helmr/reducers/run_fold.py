"""What state an event leaves a run in, and which event may follow which: the whole transition table.

The deciding functions are in :mod:`helmr.reducers.run`; what they return, :func:`apply` always accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict
from helmr.events import (
    CancelRequest,
    Consumed,
    Hold,
    Lease,
    RunSpec,
    RunState,
    Status,
    Wait,
)
from helmr.reducers import consumption

_ACTIVE: tuple[Status, ...] = ("queued", "running", "waiting")

#: The statuses each kind may be appended in; a kind that is absent may only open a run.
_ALLOWED: dict[str, tuple[Status, ...]] = {
    "held": ("queued",),
    "queued": ("queued",),
    "leased": ("queued", "running"),  # running: its process goes on at the next worker of its host
    "started": ("running",),
    "waiting": ("running",),
    "wait_completed": ("waiting",),
    "wait_timed_out": ("waiting",),
    "wait_cancelled": ("waiting",),
    "cancel_requested": ("running",),
    "lease_lost": ("running",),
    "retry_scheduled": ("running", "queued"),
    "succeeded": ("running",),
    "failed": _ACTIVE,
    "cancelled": _ACTIVE,
    "expired": ("queued",),
    "step": ("running",),
    "output": ("running",),
    "metadata": ("running",),
    "token_created": ("running",),
    "log": ("running",),
}


def apply(state: RunState | None, kind: str, data: dict[str, Any], at: datetime, *, run_id: str = "") -> RunState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow; for a terminal state that is every event.
    """
    if state is None:
        if kind not in {"queued", "held"}:
            raise Conflict(f"the first event of a run is queued or held, not {kind}")
        state = _opened(run_id, msgspec.convert(data["spec"], RunSpec), at)
    elif state.status not in _ALLOWED.get(kind, ()):
        raise Conflict(f"run {state.id} is {state.status}: {kind} cannot follow", details={"status": state.status})
    changed = _FOLDS.get(kind, _keep)(state, data, at)
    return msgspec.structs.replace(changed, cursor=state.cursor + 1)


def _opened(run_id: str, spec: RunSpec, at: datetime) -> RunState:
    return RunState(
        id=run_id,
        status="queued",
        cursor=0,
        session_id=spec.session_id,
        workspace_id=spec.workspace_id,
        deployment_id=spec.deployment_id,
        task_id=spec.task_id,
        turn=spec.turn,
        metadata=spec.metadata,
        consumed=spec.consumed,
        queue=spec.queue,
        priority=spec.priority,
        concurrency_key=spec.concurrency_key,
        ttl=spec.ttl,
        max_duration=spec.max_duration,
        created_at=at,
    )


_Fold = Callable[[RunState, dict[str, Any], datetime], RunState]


def _keep(state: RunState, _data: dict[str, Any], _at: datetime) -> RunState:
    return state


def _held(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    return msgspec.structs.replace(
        state,
        dispatch=None,
        lane=data["lane"],
        hold=Hold(cursor=state.cursor + 1, limit=data["limit"], cause=data["cause"]),
        slot=None,
        queued_at=state.queued_at or at,
    )


def _queued(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    granted = state.hold is not None and state.hold.limit == "queue"
    return msgspec.structs.replace(
        state,
        dispatch=state.cursor + 1,
        lane=data["lane"],
        hold=None,
        slot=state.hold.cursor if state.hold is not None and granted else state.slot,
        queued_at=state.queued_at or at,
    )


def _leased(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    execution = data.get("execution", 0)
    if state.status == "running":
        if not execution:
            raise Conflict(f"run {state.id} is running: leased cannot follow", details={"status": state.status})
        # The dispatch message that led here is worth nothing any more: this lease is as good as one, should it be lost.
        state = msgspec.structs.replace(_released(state, at), dispatch=state.cursor + 1, losses=state.losses + 1)
    return msgspec.structs.replace(
        state,
        status="running",
        lease=Lease(worker=data["worker"], cursor=state.cursor + 1, at=at, execution=execution),
        attempt=state.next_attempt,
        dispatch_attempt=state.dispatch_attempt + 1,
        started_at=state.started_at or at,
        ttl=None,
    )


def _released(state: RunState, at: datetime) -> RunState:
    """The lease ends: time in ``running`` is added up, and time in the queue will begin anew."""
    spent = (at - state.lease.at).total_seconds() if state.lease else 0.0
    return msgspec.structs.replace(
        state, lease=None, queued_at=None, active_seconds=state.active_seconds + max(spent, 0.0)
    )


def _waiting(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    wait = msgspec.convert({**data, "since": at}, Wait)
    return msgspec.structs.replace(
        _released(state, at), status="waiting", wait=wait, dispatch=None, slot=None, losses=0
    )


def _completed(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    """The wait has what it waited for; a record of a stream is consumed by that, for this run and all that continue it."""
    stream = state.wait.stream if state.wait else None
    woken = _woken(state, data, at)
    if stream is None:
        return woken
    taken = consumption.take(state.consumed.get(stream, Consumed()), data["sequence"], data["seq"])
    return msgspec.structs.replace(woken, consumed={**state.consumed, stream: taken})


def _woken(state: RunState, _data: dict[str, Any], _at: datetime) -> RunState:
    return msgspec.structs.replace(state, status="queued", wait=None, dispatch=None)


def _metadata(state: RunState, data: dict[str, Any], _at: datetime) -> RunState:
    return msgspec.structs.replace(state, metadata=data["metadata"])


def _cancel_requested(state: RunState, data: dict[str, Any], _at: datetime) -> RunState:
    return msgspec.structs.replace(
        state, cancel=CancelRequest(reason=data.get("reason"), force=data.get("force", False))
    )


def _lease_lost(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    losses = state.losses if data.get("orderly") else state.losses + 1
    return msgspec.structs.replace(_released(state, at), status="queued", losses=losses)


def _retry_scheduled(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
    return msgspec.structs.replace(
        _released(state, at),
        status="queued",
        dispatch=None,
        hold=None,
        slot=None,
        dispatch_attempt=0,
        next_attempt=data["attempt"],
        losses=0,
    )


def _terminal(status: Status) -> _Fold:
    def fold(state: RunState, data: dict[str, Any], at: datetime) -> RunState:
        return msgspec.structs.replace(
            _released(state, at),
            status=status,
            dispatch=None,
            hold=None,
            slot=None,
            wait=None,
            finished_at=at,
            exit_code=data.get("exit_code"),
        )

    return fold


_FOLDS: dict[str, _Fold] = {
    "held": _held,
    "queued": _queued,
    "leased": _leased,
    "waiting": _waiting,
    "wait_completed": _completed,
    "wait_timed_out": _woken,
    "wait_cancelled": _woken,
    "metadata": _metadata,
    "cancel_requested": _cancel_requested,
    "lease_lost": _lease_lost,
    "retry_scheduled": _retry_scheduled,
    "succeeded": _terminal("succeeded"),
    "failed": _terminal("failed"),
    "cancelled": _terminal("cancelled"),
    "expired": _terminal("expired"),
}
