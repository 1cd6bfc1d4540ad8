"""Whatever happens to a session, in whatever order: a state machine that tries to break the rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.log import SESSION
from helmr.errors import Conflict
from helmr.events import Draft, SessionEvent, SessionState, Status
from helmr.reducers import session as rules

_START = datetime(2026, 3, 1, 12, tzinfo=UTC)
_STATUSES = st.sampled_from([None, "queued", "running", "waiting", "succeeded", "failed", "cancelled", "expired"])
_OPENED = {"task_id": "hello", "workspace_id": "ws_1", "deployment_id": "dep_1", "run_id": "run_0", "external_id": "x"}


class SessionMachine(RuleBasedStateMachine):
    """One session, its log, and everything that may be asked of it at any time."""

    state: SessionState

    def __init__(self) -> None:
        super().__init__()
        self.events: list[SessionEvent] = []

    def _append(self, draft: Draft | None) -> None:
        if draft is None:
            return
        at = _START + timedelta(seconds=len(self.events))
        before = self.state if self.events else None
        self.state = after = rules.apply(before, draft.kind, draft.data, at, session_id="ses_1")
        fields: dict[str, Any] = {"session_id": "ses_1", "id": f"evt_{after.cursor}", "at": at, "cursor": after.cursor}
        self.events.append(SessionEvent(kind=draft.kind, data=draft.data, state=after, **fields))

    def _try(self, decide: Any, **kwargs: Any) -> bool:
        """Whether it was not refused, be it by the decision or by ``apply``."""
        try:
            self._append(decide(self.state, **kwargs))
        except Conflict:
            return False
        return True

    @initialize()
    def open(self) -> None:
        self._append(Draft(kind="opened", data=dict(_OPENED)))

    @rule()
    def turn(self) -> None:
        data = {"run_id": f"run_{self.state.turn + 1}", "turn": self.state.turn + 1}
        before = self.state
        done = self._try(lambda _: Draft(kind="turn", data=data))
        assert done == (before.status == "open")
        if done:
            assert (self.state.run_id, self.state.turn) == (data["run_id"], before.turn + 1)
            assert (
                msgspec.structs.replace(self.state, run_id=before.run_id, turn=before.turn, cursor=before.cursor)
                == before
            )

    @rule(run_status=_STATUSES)
    def close(self, run_status: Status | None) -> None:
        was = self.state.status
        done = self._try(rules.close, run_status=run_status)
        if was == "open":
            assert done == (rules.activity(run_status) == "idle"), "only an idle session is closed"
        assert (self.state.status == "closed") == (was == "closed" or (was == "open" and done))

    @rule(reason=st.none() | st.text(max_size=5))
    def cancel(self, reason: str | None) -> None:
        was = self.state.status
        self._try(rules.cancel, reason=reason)
        assert self.state.status == ("cancelled" if was in {"open", "cancelled"} else was)

    @rule(kind=st.sampled_from(["opened", "expired", "unheard_of"]))
    def other(self, kind: str) -> None:
        was = self.state.status
        self._try(lambda _: Draft(kind=kind))
        assert self.state.status == ("expired" if kind == "expired" and was == "open" else was)

    @invariant()
    def the_state_is_the_fold_of_the_events(self) -> None:
        state = None
        for number, event in enumerate(self.events, start=1):
            assert event.cursor == number
            state = rules.apply(state, event.kind, event.data, event.at, session_id="ses_1")
            assert state == event.state
        assert not self.events or state == self.state

    @invariant()
    def nothing_follows_the_end(self) -> None:
        ends = [event.cursor for event in self.events if event.state.status != "open"]
        assert ends in ([], [len(self.events)])
        if self.events:
            assert (self.state.finished_at is not None) == (self.state.status != "open")

    @invariant()
    def an_event_survives_the_wire(self) -> None:
        if self.events:
            assert SESSION.decode(msgspec.json.encode(self.events[-1])).state == self.state


SessionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestSessionMachine = SessionMachine.TestCase
