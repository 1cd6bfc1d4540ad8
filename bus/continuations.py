"""Continuing sessions: input that no run has consumed starts the next run, whatever the order of input, end of run and crash.

The session's ``turn`` event comes first and says which run follows which; then the run is made from the one before. Whoever
finds a turn without its run makes it: the ids are derived, so that there is one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from bus import records
from bus.deployments import Deployments
from bus.leases import spec_of
from bus.log import RUN, SESSION, WORKSPACE, Log, Position
from bus.presence import Presence
from bus.pull import Delivery
from bus.queueing import DEFAULT_GROUP, Gate
from bus.reactions import Reaction
from bus.stored import Superseded
from helmr import ids, subjects
from helmr.events import TERMINAL, Draft, RunEvent, RunSpec, RunState, SessionEvent, SessionState
from helmr.reducers import continuation
from helmr.reducers import run as run_rules
from helmr.reducers import session as session_rules
from helmr.reducers import workspace as workspace_rules
from helmr.reducers.continuation import Newest
from helmr.subjects import Scope


class Continuations:
    """The reaction to the end of runs; input is reacted to by :class:`bus.wakeups.Wakeups`."""

    def __init__(self, log: Log, deployments: Deployments, presence: Presence, gate: Gate) -> None:
        self.log = log
        self._deployments = deployments
        self._presence = presence
        self._gate = gate

    def reactions(self) -> list[Reaction]:
        """What is reacted to, and how."""
        ends = [subjects.of_kind("run", kind) for kind in sorted(TERMINAL)]
        return [
            Reaction("continue", ends, self._run_ended),
            Reaction("turn", [subjects.of_kind("session", "turn")], self._turned),
        ]

    async def _run_ended(self, item: Delivery) -> None:
        state = RUN.decode(item.msg.data).state
        scope = subjects.parse_event(item.msg.subject).scope
        # Nearly always there is none, and one look is enough: input that comes from here on is reacted to by itself.
        if await self._newest(scope, state.session_id, state.deployment_id):
            await self.check(scope, state.session_id)

    async def _turned(self, item: Delivery) -> None:
        """Whoever appended the turn may have died before it made the run."""
        await self.check(subjects.parse_event(item.msg.subject).scope, SESSION.decode(item.msg.data).session_id)

    async def check(self, scope: Scope, session_id: str) -> None:
        """Start the next run of a session if it is due, and complete a start that was begun."""
        while True:
            position = await self.log.last(SESSION, scope, session_id)
            if position.event is None or position.event.state.status != "open":
                return
            run = await self.log.last(RUN, scope, position.event.state.run_id)
            if run.event is None:
                await self._make_run(scope, position.event)
                return
            if not await self._turn(scope, position, run.event):
                return

    async def _turn(self, scope: Scope, position: Position[SessionEvent], run: RunEvent) -> bool:
        """Append the next turn, if one is due; whether to look again."""
        session: SessionState = position.state
        if not run.state.terminal:
            return False
        newest = await self._newest(scope, session.id, session.deployment_id)
        spec = spec_of(await self.log.first(RUN, scope, run.run_id))
        input_seq = continuation.due(run.state, spec, newest)
        if input_seq is None:
            return False
        turn = session.turn + 1
        run_id = ids.derive("run", *scope, session.id, f"turn {turn}", at_ms=_milliseconds(run))
        draft = session_rules.go_on(session, run_id=run_id, input_seq=input_seq)
        with suppress(Superseded):
            await self.log.append(SESSION, scope, session.id, position, draft)
        return True

    async def _make_run(self, scope: Scope, turned: SessionEvent) -> None:
        """Make the run of a turn from the run before it."""
        if turned.kind != "turn":
            return  # the first run: whoever opens the session makes it
        previous, session = turned.data["previous"], turned.state
        before = await self.log.present(RUN, scope, previous)
        spec = continuation.next_spec(
            before.state,
            spec_of(await self.log.first(RUN, scope, previous)),
            turn=session.turn,
            input_seq=turned.data["input_seq"],
        )
        try:
            await self.log.append(
                RUN, scope, session.run_id, Position(0, None), await self._draft(scope, session, spec)
            )
        except Superseded:
            return
        await self._cancel_if_closed(scope, session)

    async def _draft(self, scope: Scope, session: SessionState, spec: RunSpec) -> Draft:
        workspace = (await self.log.present(WORKSPACE, scope, session.workspace_id)).state
        lane = workspace_rules.lane(workspace, group=DEFAULT_GROUP, alive=set(self._presence.alive()))
        limit = self._gate(scope, session.run_id, spec, lane)
        return run_rules.create(spec, cause="input", lane=lane, limit=limit)

    async def _cancel_if_closed(self, scope: Scope, session: SessionState) -> None:
        """The session may have ended between the turn and the run."""
        present = (await self.log.present(SESSION, scope, session.id)).state
        if present.status == "open":
            return

        def decide(state: RunState) -> Draft | None:
            if state.terminal:
                return None
            return run_rules.cancel(state, reason=f"session {present.status}", force=False, holder_alive=True)

        await self.log.transact(RUN, scope, session.run_id, decide)

    async def _newest(self, scope: Scope, session_id: str, deployment_id: str) -> dict[str, Newest]:
        found: dict[str, Newest] = {}
        for stream in await self._inputs(scope, deployment_id):
            last = await records.last(self.log.js, subjects.io(scope, session_id, "in", stream))
            if last is not None:
                found[stream] = Newest(sequence=last.record.sequence, seq=last.seq, at=last.record.at)
        return found

    async def _inputs(self, scope: Scope, deployment_id: str) -> list[str]:
        index: dict[str, Any] = (await self._deployments.load(scope, deployment_id)).index
        return [each["name"] for each in index.get("streams", ()) if each["direction"] == "input"]


def _milliseconds(run: RunEvent) -> int:
    """When a run ended, for the id of the next: the same whoever makes it."""
    return int((run.state.finished_at or run.at).timestamp() * 1000)
