"""The words for a live run: what it is doing or why it is not, since when, and what would change that. Pure; no I/O."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec

from bus import topology
from bus.presence import WorkerInfo
from bus.queueing import is_group
from helmr.durations import format_seconds
from helmr.events import Lease, RunEvent, RunState, Wait
from helmr.explanation import Explanation, clock, ended, since, span
from helmr.models import QueueHolder, Run
from helmr.reducers.queue import Limits

#: Holders that are named; the facts have them all.
_NAMED = 3


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found out about a run at ``now``; the events are the latest of their kind."""

    now: datetime
    run: Run
    last: RunEvent
    lost: RunEvent | None = None
    retry: RunEvent | None = None
    started: RunEvent | None = None
    cancel: RunEvent | None = None
    note: str | None = None  #: what the worker said last about preparing the workspace
    limits: Limits = Limits()  #: of the run's queue
    holders: list[QueueHolder] = []  #: who has the slots that the run could have
    full: bool = False  #: whether the queue has no slot for it
    ahead: int | None = None  #: held runs that are admitted first
    before: int = 0  #: runs in the lane before it
    lane_waiting: int = 0
    lane_most: int = 0
    workers: list[WorkerInfo] = []  #: that take runs from its lane
    holder: WorkerInfo | None = None  #: the worker that has its lease, while it is alive

    @property
    def state(self) -> RunState:
        """The run's state."""
        return self.last.state


class Words(msgspec.Struct, kw_only=True):
    """What a case has to say: its code, since when, sentences and facts."""

    state: str
    since: datetime
    told: list[str]
    facts: dict[str, Any] = {}


def explain(found: Situation) -> Explanation:
    """The explanation of a run."""
    state = found.state
    if state.terminal:
        return ended(found.run, found.now)
    if state.lease is not None:
        words = _running(found, state.lease)
    elif state.wait is not None:
        words = _waiting(found, state.wait)
    else:
        words = _queued(found)
    return Explanation(
        run_id=found.run.id,
        status=found.run.status,
        state=words.state,
        since=words.since,
        text=f"{found.run.id} {' '.join(words.told)}",
        facts=words.facts,
    )


def _queued(found: Situation) -> Words:
    state = found.state
    if state.hold is not None:
        words = _held_by_queue(found) if state.hold.limit == "queue" and found.full else _held_by_backlog(found)
    elif found.last.kind == "retry_scheduled":
        words = _retrying(found)
    elif found.last.kind == "lease_lost":
        words = _lost(found, found.last)
    elif state.dispatch is None:
        words = _woken(found)
    else:
        words = _in_lane(found)
    if state.ttl is not None:
        due = found.run.created_at + timedelta(seconds=state.ttl)
        words.told.append(f"Unless a worker takes it by {clock(found.now, due)}, it expires.")
        words.facts["expires_at"] = due
    return words


def _held_by_queue(found: Situation) -> Words:
    run, at = found.run, found.state.queued_at or found.last.at
    whose = "the queue" if found.limits.total is not None else _key(run.concurrency_key)
    names = [f"{each.run_id} ({each.status}, {span(found.now, each.since)})" for each in found.holders[:_NAMED]]
    more = len(found.holders) - len(names)
    who = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    told = [
        f"is held {since(found.now, at)} by the limit of queue {run.queue}: {_limits(found.limits)}.",
        f"The slots of {whose} are with {who}." if names else f"No slot of {whose} is free.",
        _ahead(found),
        "It is admitted when one of these ends or waits, or when a deployment raises the limit.",
    ]
    facts = {
        "queue": run.queue,
        "concurrency_key": run.concurrency_key,
        "limits": msgspec.to_builtins(found.limits),
        "holders": msgspec.to_builtins(found.holders),
        "ahead": found.ahead,
    }
    return Words(state="held_by_queue", since=at, told=told, facts=facts)


def _key(key: str | None) -> str:
    return "the runs without a concurrency key" if key is None else f"concurrency key {key}"


def _limits(limits: Limits) -> str:
    if limits.total is not None:
        each = f", {limits.per_key} of each concurrency key" if limits.per_key is not None else ""
        return f"{limits.total} at once{each}"
    return f"{limits.per_key} at once of each concurrency key"


def _ahead(found: Situation) -> str:
    match found.ahead:
        case None | 0:
            return "It is the next in turn."
        case 1:
            return "One run is admitted before it."
        case number:
            return f"{number} runs are admitted before it."


def _held_by_backlog(found: Situation) -> Words:
    lane, at = found.state.lane or "", found.state.queued_at or found.last.at
    facts = {"lane": lane, "waiting": found.lane_waiting, "most": found.lane_most, "ahead": found.ahead}
    if found.lane_waiting < found.lane_most:
        told = [f"is held {since(found.now, at)}, and there is room for it now: it is admitted at once."]
        return Words(state="held_by_backlog", since=at, told=told, facts=facts)
    told = [
        f"is held {since(found.now, at)}: {found.lane_waiting} runs wait for {_whom(lane)} already.",
        "Those beyond that are let in by turns.",
        _ahead(found),
        _capacity(found, lane),
    ]
    return Words(state="held_by_backlog", since=at, told=told, facts=facts | _workers(found))


def _whom(lane: str) -> str:
    return {"@": f"worker {lane[1:]}", "~": f"a worker on host {lane[1:]}"}.get(lane[:1], f"a worker of group {lane}")


def _capacity(found: Situation, lane: str) -> str:
    """Who could take it, or that nobody can, and what to do about that."""
    if not found.workers:
        return _nobody(lane)
    if all(worker.full for worker in found.workers):
        names = ", ".join(worker.id for worker in found.workers)
        return f"The disk of its machine is almost full, so that {names} takes nothing new: make room there."
    takers = [worker for worker in found.workers if not worker.obstacle]
    if not takers:
        return _hindered(found.workers)
    busy, slots = sum(w.running for w in takers), sum(w.slots for w in takers)
    many = f"are {len(takers)} workers" if len(takers) > 1 else "is one worker"
    return (
        f"There {many} for it, with {busy} of {slots} slots busy; it moves on as runs end, or sooner with more workers."
    )


def _hindered(workers: list[WorkerInfo]) -> str:
    told = "; ".join(f"{worker.id}: {worker.obstacle}" for worker in workers[:_NAMED])
    return f"Nobody takes it at the moment ({told}); it moves on by itself when that is over."


def _nobody(lane: str) -> str:
    if lane[:1] == "~":
        return f"No worker runs on host {lane[1:]}, which has its workspace's files: start one there."
    if lane[:1] == "@":
        return f"That worker is gone; the run is moved within {topology.PRESENCE_TTL + topology.HEARTBEAT:.0f} s."
    group = "" if lane == "default" else f" --group {lane}"
    return f"No worker of that group takes runs: start one with `helmr worker{group}`."


def _workers(found: Situation) -> dict[str, Any]:
    full = [worker.id for worker in found.workers if worker.full]
    away = {worker.id: worker.engine_problem for worker in found.workers if worker.engine_problem}
    facts = {"disk_full": full, "engine_problems": away}
    return {"workers": [worker.id for worker in found.workers]} | {name: what for name, what in facts.items() if what}


def _in_lane(found: Situation) -> Words:
    lane, at = found.state.lane or "", found.state.queued_at or found.last.at
    again = f", dispatched again after {_loss(found, found.lost)}" if found.lost and _redispatched(found) else ""
    told = [f"waits {since(found.now, at)} for {_whom(lane)}{again}."]
    if found.workers or is_group(lane):
        told.append(f"{found.before} runs are taken before it." if found.before else "No run is before it.")
    told.append(_capacity(found, lane))
    facts = {"lane": lane, "before": found.before, **_workers(found)}
    return Words(state="queued" if found.workers else "no_worker", since=at, told=told, facts=facts)


def _redispatched(found: Situation) -> bool:
    return found.last.data.get("cause") == "redispatch"


def _loss(found: Situation, lost: RunEvent) -> str:
    return f"worker {lost.data.get('worker')} was lost at {clock(found.now, lost.at)} ({lost.data.get('reason')})"


def _lost(found: Situation, lost: RunEvent) -> Words:
    told = [
        f"is to be executed again: {_loss(found, lost)}.",
        f"That was dispatch {found.run.dispatch_attempt} of attempt {found.run.attempt}.",
        f"Another worker takes it within {topology.ACK_WAIT:.0f} s, if there is one.",
    ]
    facts = {"worker": lost.data.get("worker"), "reason": lost.data.get("reason")}
    return Words(state="lost", since=lost.at, told=told, facts=facts)


def _retrying(found: Situation) -> Words:
    event = found.last
    due, failure = datetime.fromisoformat(event.data["at"]), event.data.get("failure") or {}
    why = f"{failure.get('code')}: {failure.get('message')}".partition("\n")[0]
    told = [
        f"is to be retried: attempt {event.data['attempt'] - 1} failed at {clock(found.now, event.at)} with {why.rstrip('.')}.",
        f"Attempt {event.data['attempt']} is queued at {clock(found.now, due)}"
        + (f", in {span(found.now, due)}." if due > found.now else ", now."),
    ]
    return Words(
        state="retrying",
        since=event.at,
        told=told,
        facts={"attempt": event.data["attempt"], "at": due, "failure": failure},
    )


def _woken(found: Situation) -> Words:
    told = [f"was woken at {clock(found.now, found.last.at)} and is about to be queued; control does that at once."]
    return Words(state="woken", since=found.last.at, told=told)


def _running(found: Situation, lease: Lease) -> Words:
    state = found.state
    left = max(state.max_duration - state.active_seconds - (found.now - lease.at).total_seconds(), 0.0)
    if found.holder is None:
        words = _silent(found, lease)
    else:
        words = _cancelling(found, lease) if state.cancel is not None else _executing(found, lease)
        limit = format_seconds(state.max_duration)
        words.told.append(f"It has {format_seconds(left)} left of its maximum duration of {limit}.")
    words.facts |= {"worker": lease.worker, "leased_at": lease.at, "seconds_left": round(left, 3)}
    return words


def _executing(found: Situation, lease: Lease) -> Words:
    began = found.started
    if began is None or began.cursor < lease.cursor:  # that was another lease
        doing = f": {found.note}" if found.note else ""
        told = [f"has been on worker {lease.worker} {since(found.now, lease.at)}, which prepares its workspace{doing}."]
        return Words(state="preparing", since=lease.at, told=told, facts={"note": found.note})
    told = [
        f"is running on worker {lease.worker} {since(found.now, began.at)}, {_attempt(found)}.",
        f"It goes on until its task ends; `helmr run logs {found.run.id} --follow` shows what it does.",
    ]
    return Words(state="running", since=began.at, told=told)


def _attempt(found: Situation) -> str:
    again = f", dispatch {found.run.dispatch_attempt}" if found.run.dispatch_attempt > 1 else ""
    return f"attempt {found.run.attempt}{again}"


def _silent(found: Situation, lease: Lease) -> Words:
    told = [
        f"was leased by worker {lease.worker} {since(found.now, lease.at)}, of which nothing is heard any more.",
        "Unless that worker is back, the run is taken from it and dispatched again as soon as another one takes its place.",
    ]
    return Words(state="silent", since=lease.at, told=told)


def _cancelling(found: Situation, lease: Lease) -> Words:
    asked = found.cancel
    at = asked.at if asked else lease.at
    request = found.state.cancel
    reason = f" ({request.reason})" if request and request.reason else ""
    end = (
        "Its process tree is being killed."
        if request and request.force
        else f"The task may clean up; then its process tree is killed. `helmr run cancel {found.run.id} --force` does not wait."
    )
    told = [f"is being cancelled {since(found.now, at)}{reason}, on worker {lease.worker}.", end]
    return Words(
        state="cancelling", since=at, told=told, facts={"requested_at": at, "force": bool(request and request.force)}
    )


def _waiting(found: Situation, wait: Wait) -> Words:
    run, at = found.run, wait.since or found.last.at
    match wait.kind:
        case "stream":
            with_id = f" with correlation id {wait.correlation_id}" if wait.correlation_id else ""
            what = f"for a record of input stream {wait.stream}{with_id}"
            change = f"`helmr session input send {run.session_id} {wait.stream}` sends one."
        case "token":
            what, change = f"for token {wait.token}", f"Whoever completes token {wait.token} wakes it."
        case _:
            what, change = "for a timer", ""
    until = f" until {clock(found.now, wait.due)} (in {span(found.now, wait.due)})" if wait.due else ""
    told = [f"waits {what} {since(found.now, at)}{until}; it holds no slot meanwhile.", *([change] if change else [])]
    facts = {key: value for key, value in msgspec.to_builtins(wait).items() if key != "since"}
    return Words(state="waiting", since=at, told=told, facts=facts)
