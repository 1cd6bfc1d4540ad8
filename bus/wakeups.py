"""Waking runs: reactors that see a record, the end of a token, a due timer or a new wait, and end the wait that is over."""

from __future__ import annotations

from bus import topology, waits
from bus.continuations import Continuations
from bus.log import RUN, SESSION, TOKEN, Log, Position
from bus.presence import Presence
from bus.pull import Delivery
from bus.queueing import Gate, enqueue
from bus.reactions import Reaction
from helmr import subjects
from helmr.events import RunEvent, RunState, SessionState
from helmr.subjects import Scope

_TOKEN_ENDS = ("completed", "cancelled", "expired")


class Wakeups:
    """The reactions that end waits, and queue the runs that are awake."""

    def __init__(self, log: Log, presence: Presence, gate: Gate, continuations: Continuations) -> None:
        self.log = log
        self.presence = presence
        self._gate = gate
        self._continuations = continuations

    def reactions(self) -> list[Reaction]:
        """What is reacted to, and how."""
        ends = [subjects.of_kind("token", kind) for kind in _TOKEN_ENDS]
        return [
            Reaction("waiting", [subjects.of_kind("run", "waiting")], self._waiting),
            Reaction("woken", [subjects.of_kind("run", kind) for kind in waits.ENDS], self._woken),
            Reaction("token", ends, self._token_ended),
            Reaction("input", [subjects.ALL_INPUT], self._record, stream=topology.SESSIONS),
        ]

    async def wake(self, scope: Scope, run_id: str) -> RunState | None:
        """End the wait of a run if that is over, and queue the run; returns its state."""
        position = await waits.settle(self.log, scope, run_id)
        state: RunState | None = position.state
        if state is not None and state.status == "queued" and state.dispatch is None and state.hold is None:
            await self._enqueue(scope, run_id, position)
        return state

    async def due(self, scope: Scope, run_id: str) -> None:
        """The timer of a wait fired."""
        state = await self.wake(scope, run_id)
        if state is not None:
            await waits.rearm(self.log, scope, run_id, state)

    async def _enqueue(self, scope: Scope, run_id: str, known: Position[RunEvent] | None = None) -> None:
        alive = set(self.presence.alive())
        await enqueue(self.log, scope, run_id, cause="resume", alive=alive, gate=self._gate, known=known)

    async def _waiting(self, item: Delivery) -> None:
        """A run waits: its worker may have died before it looked for what came first."""
        await self.wake(subjects.parse_event(item.msg.subject).scope, RUN.decode(item.msg.data).run_id)

    async def _woken(self, item: Delivery) -> None:
        """A wait is over: whoever said so may have died before the run was queued."""
        await self._enqueue(subjects.parse_event(item.msg.subject).scope, RUN.decode(item.msg.data).run_id)

    async def _token_ended(self, item: Delivery) -> None:
        """A token is completed, cancelled or expired: wake whoever waits for it."""
        state = TOKEN.decode(item.msg.data).state
        scope = subjects.parse_event(item.msg.subject).scope
        for run_id in {*state.waiters, *([state.run_id] if state.run_id else [])}:
            await self.wake(scope, run_id)

    async def _record(self, item: Delivery) -> None:
        """A record was sent: wake the run of its session if it waits for that, or start the next one."""
        place = subjects.parse_io(item.msg.subject)
        session: SessionState | None = (await self.log.last(SESSION, place.scope, place.session_id)).state
        if session is None:
            return
        run = await self.wake(place.scope, session.run_id)
        if run is None or run.terminal:
            await self._continuations.check(place.scope, session.id)
