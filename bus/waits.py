"""Ending waits: finding out whether what a run waits for is there, and saying so in its log.

A wait is registered first and checked afterwards; a record, a completed token or a due timer is stored first, and the runs that
wait are looked for afterwards. Whichever comes second finds the other. Worker, control and its reactors all may; the
compare-and-set append has one of them succeed.
"""

from __future__ import annotations

import asyncio

from bus import records, timers, topology
from bus.log import RUN, TOKEN, Log, Position
from bus.records import Stored
from bus.stored import Superseded, get_message
from helmr import events, subjects
from helmr.errors import NotFound
from helmr.events import Consumed, Draft, RunEvent, RunState, Wait
from helmr.reducers import consumption
from helmr.reducers import run as rules
from helmr.subjects import Scope

#: What the timer of a wait is called (:mod:`bus.timers`).
TIMER = "wait"
#: The kinds that end a wait.
ENDS = ("wait_completed", "wait_timed_out", "wait_cancelled")


async def settle(log: Log, scope: Scope, run_id: str) -> Position[RunEvent]:
    """End the wait of a run if what it waits for is there, or its time is up; returns where the run is then.

    Raises:
        NotFound: there is no such run.
    """
    while True:
        position = await log.last(RUN, scope, run_id)
        state: RunState | None = position.state
        if state is None or state.status != "waiting" or state.wait is None:
            return position
        draft = await _end(log, scope, state, state.wait)
        if draft is None:
            return position
        headers = timers.cancel_header(scope, run_id, TIMER) if state.wait.due is not None else None
        try:
            return await log.append(RUN, scope, run_id, position, draft, headers=headers)
        except Superseded:
            continue


async def _end(log: Log, scope: Scope, state: RunState, wanted: Wait) -> Draft | None:
    """What ends the wait now, if anything does."""
    found = None
    if wanted.kind == "stream":
        found = await _stream(log, scope, state, wanted)
    elif wanted.kind == "token":
        found = await _token(log, scope, state, wanted)
    return found or rules.time_out_wait(state, at=events.now())


async def _stream(log: Log, scope: Scope, state: RunState, wanted: Wait) -> Draft | None:
    stored = await next_record(log, scope, state, wanted.stream or "", wanted.correlation_id)
    if stored is None:
        return None
    record = stored.record
    told = {"stream": record.stream, "sequence": record.sequence, "seq": stored.seq, "record_id": record.id}
    return rules.complete_wait(state, **told, correlation_id=record.correlation_id, data=record.data)


async def next_record(
    log: Log, scope: Scope, state: RunState, stream: str, correlation_id: str | None
) -> Stored | None:
    """The first record of an input stream that no run of the session has consumed."""
    consumed = state.consumed.get(stream, Consumed())
    subject = subjects.io(scope, state.session_id, "in", stream)
    async for stored in records.records(log.js, subject, after=consumed.seq):
        if correlation_id not in (None, stored.record.correlation_id):
            continue
        if not consumption.has(consumed, stored.record.sequence):
            return stored
    return None


async def _token(log: Log, scope: Scope, state: RunState, wanted: Wait) -> Draft | None:
    token_id = wanted.token or ""
    token = (await log.last(TOKEN, scope, token_id)).event
    if token is None:
        return rules.cancel_wait(state, reason=f"there is no token {token_id} in {scope}")
    match token.state.status:
        case "completed":
            return rules.complete_wait(state, token=token_id, data=token.data["data"])
        case "cancelled":
            return rules.cancel_wait(state, reason=token.state.reason or f"token {token_id} was cancelled")
        case "expired":
            return rules.expire_wait(state)
        case "pending":
            return None


async def rearm(log: Log, scope: Scope, run_id: str, state: RunState) -> None:
    """A timer fired before its time: set it again."""
    if state.status == "waiting" and state.wait is not None and state.wait.due is not None:
        await timers.arm(log, scope, run_id, TIMER, state.wait.due)


async def outcome(log: Log, scope: Scope, run_id: str) -> RunEvent:
    """The event that ended the latest wait of a run.

    Raises:
        NotFound: no wait of it has ended.
    """
    places = [subjects.event(scope, "run", run_id, kind) for kind in ENDS]
    found = await asyncio.gather(*(get_message(log.js, topology.RUNS, place) for place in places))
    ends = [RUN.decode(message[1]) for message in found if message is not None]
    if not ends:
        raise NotFound(f"run {run_id} has not waited")
    return max(ends, key=lambda event: event.cursor)
