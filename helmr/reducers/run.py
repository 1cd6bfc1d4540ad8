"""The life of a run: what is decided about it.

Each function (``lease``, ``cancel``, …) turns a command into one draft, or raises :class:`~helmr.errors.Conflict` with the
reason. What follows from it, and may follow it, is told by :mod:`helmr.reducers.run_fold`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Protocol

import msgspec

from helmr.errors import Conflict
from helmr.events import (
    Cause,
    Draft,
    Failure,
    Hold,
    Limit,
    RetryPolicy,
    RunSpec,
    RunState,
    Status,
    Wait,
)

#: Leases lost in a row after which a run fails with ``dispatch_exhausted``.
MAX_DISPATCH_ATTEMPTS = 5
#: Failure codes a retry policy may act on.
RETRYABLE = frozenset({"task_error", "task_exit", "out_of_memory", "max_duration", "worker_lost"})


def create(spec: RunSpec, *, cause: Cause, lane: str, limit: Limit | None = None) -> Draft:
    """Open a run: ready to be leased in ``lane``, or held back by ``limit``."""
    draft = _enqueued(cause, lane, limit, queue=spec.queue, key=spec.concurrency_key)
    return msgspec.structs.replace(draft, data=draft.data | {"spec": msgspec.to_builtins(spec)})


def requeue(state: RunState, *, cause: Cause, lane: str, limit: Limit | None = None) -> Draft | None:
    """Queue a run again that has no valid dispatch message: because it was woken, retried or lost.

    With ``limit`` it is held back, unless it uses a slot still: a run that lost its worker keeps its place. An older dispatch
    message becomes stale. None: the run is held, and will be admitted; or it has lost nothing, because its lease came to an end
    of its own: it waits for its retry, or was woken, and goes the way of those.
    """
    _require(state, "queued")
    keeps_place = cause == "redispatch"
    if state.hold is not None or (keeps_place and state.dispatch is None):
        return None
    return _enqueued(cause, lane, None if keeps_place else limit, queue=state.queue, key=state.concurrency_key)


def _enqueued(cause: Cause, lane: str, limit: Limit | None, *, queue: str | None, key: str | None) -> Draft:
    data: dict[str, Any] = {"cause": cause, "lane": lane}
    if limit is None:
        return Draft(kind="queued", data=data, message=f"queued in {lane}")
    message = f"held by the limit of queue {queue}" if limit == "queue" else f"held: enough runs wait in {lane} already"
    return Draft(kind="held", data=data | {"limit": limit, "key": key}, message=message)


def admit(state: RunState, *, held: int, lane: str) -> Draft | None:
    """Dispatch a run that has been held since its event ``held``. None: it is not (any more)."""
    if state.hold is None or state.hold.cursor != held:
        return None
    return Draft(kind="queued", data={"cause": state.hold.cause, "lane": lane}, message=f"queued in {lane}")


class Occupant(Protocol):
    """What is asked of a run about its slot; :class:`~helmr.events.RunState` is one."""

    @property
    def cursor(self) -> int: ...
    @property
    def hold(self) -> Hold | None: ...
    @property
    def slot(self) -> int | None: ...


def has_left(run: Occupant, *, held: int) -> bool:
    """Whether a run has given up the slot that was granted for its event ``held``: it ended, waits, or will be retried.

    It has not while it is held still (the grant is not carried out yet), nor when what is known of it is older than that.
    """
    return run.cursor > held and run.slot != held


def lease(state: RunState, *, worker: str, dispatch: int, execution: int = 0) -> Draft:
    """Take the run for ``worker``, on the strength of the dispatch message with cursor ``dispatch``.

    ``execution`` is the cursor of the lease that the process was started under which this worker has kept for it, if it has.
    """
    _require(state, "queued")
    if state.dispatch != dispatch:
        raise Conflict(f"run {state.id}: this dispatch message is stale", details={"dispatch": state.dispatch})
    return _lease(state, worker, execution, f"leased by {worker}")


def inherit(state: RunState, *, worker: str, former: str, execution: int) -> Draft:
    """Take the run over from ``former``, which is known to be gone, together with its live process.

    Raises:
        Conflict: it is not executed by ``former`` (any more), or not in this process; or it has lost its worker too often.
    """
    _require(state, "running")
    lease = state.lease
    if lease is None or lease.worker != former or execution not in {lease.cursor, lease.execution or lease.cursor}:
        raise Conflict(f"run {state.id} is not executed by {former} in a process of its lease {execution}")
    if state.losses + 1 >= MAX_DISPATCH_ATTEMPTS:
        raise Conflict(f"run {state.id} has lost its worker {state.losses + 1} times in a row")
    return _lease(state, worker, execution, f"taken over by {worker} from {former}")


def _lease(state: RunState, worker: str, execution: int, message: str) -> Draft:
    attempt, again = state.next_attempt, state.dispatch_attempt + 1
    data: dict[str, Any] = {"worker": worker, "attempt": attempt, "dispatch_attempt": again}
    data |= {"execution": execution} if execution else {}
    return Draft(kind="leased", data=data, message=message, source="worker")


def holds(state: RunState, *, worker: str, cursor: int) -> bool:
    """Whether the lease that began with the event ``cursor`` is still this worker's: the fence."""
    return state.lease is not None and state.lease.worker == worker and state.lease.cursor == cursor


def lose_lease(state: RunState, *, reason: str, orderly: bool = False) -> Draft:
    """The holder is gone, or stops in good order."""
    _require(state, "running")
    worker = state.lease.worker if state.lease else None
    data = {"worker": worker, "reason": reason} | ({"orderly": True} if orderly else {})
    return Draft(kind="lease_lost", data=data, message=reason, source="worker")


def abandon(state: RunState, spec: RunSpec, *, reason: str, began: bool, at: datetime, orderly: bool = False) -> Draft:
    """The holder does not execute the run any more, and it has not ended.

    It goes back to the queue, unless somebody wanted its end anyway, the task's code began and may not begin twice, or it has
    been dispatched too often. ``orderly``: a worker hands it back that was told to stop, or is not where its workspace is; that
    says nothing about the run.
    """
    if state.cancel is not None:
        return cancelled(state.cancel.reason, source="worker")
    if began and spec.on_worker_lost == "fail":
        return end_attempt(state, spec, Failure(code="worker_lost", message=reason), at=at)
    if state.losses + 1 >= MAX_DISPATCH_ATTEMPTS and not orderly:
        return exhausted(state, reason)
    return lose_lease(state, reason=reason, orderly=orderly)


def wait(state: RunState, wanted: Wait, **data: Any) -> Draft:
    """The task waits; the lease ends here. ``data`` is kept with the event.

    Raises:
        Conflict: somebody wants the run's end: then there is nothing to wait for.
    """
    _require(state, "running")
    if state.cancel is not None:
        raise Conflict(f"run {state.id} is being cancelled")
    body = {**msgspec.to_builtins(wanted), **data}
    body.pop("since", None)
    return Draft(kind="waiting", data=body, message=f"waits for {describe(wanted)}", source="worker")


def describe(wanted: Wait) -> str:
    """What a run waits for, in a few words."""
    match wanted.kind:
        case "stream":
            whose = f" with correlation id {wanted.correlation_id}" if wanted.correlation_id is not None else ""
            return f"a record of stream {wanted.stream}{whose}"
        case "token":
            return f"token {wanted.token}"
        case "timer":
            return f"{wanted.due:%Y-%m-%d %H:%M:%S} UTC" if wanted.due else "a timer"


def complete_wait(state: RunState, **result: Any) -> Draft:
    """What the run waits for is there; of a stream's record ``result`` has ``sequence``, ``seq`` and ``data``."""
    _require(state, "waiting")
    kept = {"kind": state.wait.kind, **result} if state.wait else result
    return Draft(kind="wait_completed", data=kept, message="the wait is over")


def time_out_wait(state: RunState, *, at: datetime) -> Draft | None:
    """The time of the wait is up: a timer has what it waited for, anything else has timed out. None: not yet."""
    _require(state, "waiting")
    wanted = state.wait
    if wanted is None or wanted.due is None or wanted.due > at:
        return None
    return complete_wait(state) if wanted.kind == "timer" else expire_wait(state)


def expire_wait(state: RunState) -> Draft:
    """What the run waits for did not come in time."""
    _require(state, "waiting")
    wanted = state.wait or Wait(kind="timer")
    return Draft(kind="wait_timed_out", data={"kind": wanted.kind}, message=f"{describe(wanted)} did not come in time")


def cancel_wait(state: RunState, *, reason: str) -> Draft:
    """What the run waits for will never come; the task hears of it."""
    _require(state, "waiting")
    kind = state.wait.kind if state.wait else "token"
    return Draft(kind="wait_cancelled", data={"kind": kind, "reason": reason}, message=reason)


def exhausted(state: RunState, reason: str) -> Draft:
    """The run has lost its worker too often in a row: a wait, or another attempt, starts the count anew."""
    message = (
        f"dispatched {state.losses + 1} times in a row without an end: each time its worker, its machine or what watches "
        f"over its process was lost; at last: {reason}"
    )
    return fail(Failure(code="dispatch_exhausted", message=message))


def cancel(state: RunState, *, reason: str | None, force: bool, holder_alive: bool) -> Draft | None:
    """End the run: at once when nothing executes it (or, forced, when its worker is gone), else by request.

    None means that the very request stands already.
    """
    if state.terminal:
        raise Conflict(f"run {state.id} is {state.status} already", details={"status": state.status})
    if state.status != "running" or (force and not holder_alive):
        return cancelled(reason)
    if state.cancel and (state.cancel.force or not force):
        return None
    data = {"reason": reason, "force": force}
    return Draft(kind="cancel_requested", data=data, message=reason or "cancel requested")


def cancelled(reason: str | None, *, source: str = "control", **data: Any) -> Draft:
    """Nothing of the run is alive any more, by request."""
    return Draft(
        kind="cancelled",
        data={"reason": reason, **data},
        message=reason or "cancelled",
        source="worker" if source == "worker" else "control",
    )


def fail(failure: Failure, *, exit_code: int | None = None, **data: Any) -> Draft:
    """The run ends as failed."""
    body = {"failure": _told(failure), **data}
    if exit_code is not None:
        body["exit_code"] = exit_code
    return Draft(kind="failed", data=body, message=failure.message.partition("\n")[0][:500], source="worker")


def end_attempt(
    state: RunState,
    spec: RunSpec,
    failure: Failure,
    *,
    at: datetime,
    chance: Callable[[], float] = random.random,
    **data: Any,
) -> Draft:
    """A failed attempt leads to another one, if the retry policy says so, or to the end of the run."""
    policy = spec.retry
    attempt = state.attempt or 1
    if policy is None or state.cancel or not _may_retry(policy, failure, attempt):
        return fail(failure, **data)
    due = at + timedelta(seconds=retry_delay(policy, attempt, chance))
    body = {"attempt": attempt + 1, "at": due.isoformat(), "failure": _told(failure), **data}
    return Draft(
        kind="retry_scheduled", data=body, message=f"attempt {attempt} failed: {failure.message}"[:500], source="worker"
    )


def _told(failure: Failure) -> dict[str, Any]:
    """A failure as events carry it: with the word on whether a retry policy may act on it."""
    told: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(failure, retryable=failure.code in RETRYABLE))
    return told


def _may_retry(policy: RetryPolicy, failure: Failure, attempt: int) -> bool:
    wanted = failure.code in policy.codes if policy.codes is not None else True
    return failure.code in RETRYABLE and wanted and attempt < policy.max_attempts


def retry_delay(policy: RetryPolicy, attempt: int, chance: Callable[[], float]) -> float:
    """Seconds before the attempt after ``attempt``: exponential, capped, with full jitter unless switched off."""
    try:
        full = min(policy.max_delay, policy.min_delay * policy.factor ** (attempt - 1))
    except OverflowError:  # beyond any float is beyond the cap
        full = policy.max_delay
    return full * chance() if policy.jitter else full


def expire(state: RunState, *, ttl: float) -> Draft:
    """The run was not leased within its time to live."""
    _require(state, "queued")
    if state.attempt is not None:
        raise Conflict(f"run {state.id} has been leased before: its ttl no longer counts")
    return Draft(kind="expired", data={"ttl": ttl}, message=f"not started within {ttl:g} s")


def _require(state: RunState, *statuses: Status) -> None:
    if state.status not in statuses:
        wanted = " or ".join(statuses)
        raise Conflict(f"run {state.id} is {state.status}, not {wanted}", details={"status": state.status})
