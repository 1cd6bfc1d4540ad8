"""Workers that take, lose and give up a workspace in whatever order: a state machine that tries to have it live twice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.log import WORKSPACE
from helmr.errors import Conflict
from helmr.events import Draft, WorkspaceEvent, WorkspaceState
from helmr.reducers import workspace as rules

_START = datetime(2026, 3, 1, 12, tzinfo=UTC)
#: Workers, and the host each is on.
_HOSTS = {"wrk_a": "host_1", "wrk_b": "host_1", "wrk_c": "host_2"}
_WORKERS = st.sampled_from(sorted(_HOSTS))
_ALIVE = st.sets(_WORKERS)


class WorkspaceMachine(RuleBasedStateMachine):
    """One workspace, its log, and three workers on two hosts that want it."""

    state: WorkspaceState

    def __init__(self) -> None:
        super().__init__()
        self.events: list[WorkspaceEvent] = []

    def _append(self, draft: Draft | None) -> None:
        if draft is None:
            return
        at = _START + timedelta(seconds=len(self.events))
        before = self.state if self.events else None
        self.state = after = rules.apply(before, draft.kind, draft.data, at, workspace_id="ws_1")
        fields: dict[str, Any] = {"workspace_id": "ws_1", "id": f"evt_{after.cursor}", "at": at, "cursor": after.cursor}
        self.events.append(WorkspaceEvent(kind=draft.kind, data=draft.data, state=after, **fields))

    def _live_on(self) -> str | None:
        return self.state.materialization.worker if self.state.materialization else None

    @initialize()
    def create(self) -> None:
        self._append(rules.create(sandbox="box", fingerprint="f", deployment_id="dep_1", mount_path="/workspace"))

    @rule(worker=_WORKERS, evict=st.none() | _WORKERS)
    def materialize(self, worker: str, evict: str | None) -> None:
        live, home = self._live_on(), self.state.host
        allowed = self.state.status == "active" and live in {None, worker, evict} and home in {None, _HOSTS[worker]}
        try:
            self._append(rules.materialize(self.state, worker=worker, host=_HOSTS[worker], ref="", evict=evict))
        except Conflict:
            assert not allowed
            assert self._live_on() == live
        else:
            assert allowed
            assert (self._live_on(), self.state.host) == (worker, _HOSTS[worker])

    @rule(worker=_WORKERS, former=_WORKERS)
    def inherit(self, worker: str, former: str) -> None:
        live, home = self._live_on(), self.state.host
        allowed = self.state.status == "active" and live == former and home == _HOSTS[worker]
        try:
            self._append(rules.inherit(self.state, worker=worker, former=former, host=_HOSTS[worker], ref="c1"))
        except Conflict:
            assert not allowed
            assert self._live_on() == live
        else:
            assert allowed
            assert (self._live_on(), self.state.host) == (worker, home)

    @rule(worker=_WORKERS)
    def stop(self, worker: str) -> None:
        live = self._live_on()
        self._append(rules.stop(self.state, worker=worker, reason="idle"))
        assert self._live_on() == (None if live == worker else live), "nobody stops what is live on another worker"

    @rule(fingerprint=st.sampled_from("fgh"), tag=st.sampled_from(["a", "b"]))
    def update(self, fingerprint: str, tag: str) -> None:
        live, before = self._live_on(), self.state.fingerprint
        box = {"sandbox": "box", "fingerprint": fingerprint, "deployment_id": "dep_2", "mount_path": "/workspace"}
        try:
            self._append(rules.update(self.state, rules.Changes(tag=(tag,), sandbox=box)))
        except Conflict:
            assert live is not None
            assert before != fingerprint
            assert self.state.fingerprint == before, "what is live keeps its walls"
        else:
            assert self.state.fingerprint == fingerprint
            assert tag in self.state.tags
        assert self._live_on() == live

    @rule(alive=_ALIVE)
    def lane(self, alive: set[str]) -> None:
        lane, live, host = rules.lane(self.state, group="default", alive=alive), self._live_on(), self.state.host
        if live in alive:
            assert lane == f"@{live}"
        else:
            assert lane == ("default" if host is None else f"~{host}")

    @rule(kind=st.sampled_from(["created", "unheard_of"]))
    def other(self, kind: str) -> None:
        before = self.state
        try:
            self._append(Draft(kind=kind))
        except Conflict:
            assert self.state == before
        else:
            raise AssertionError(kind)

    @invariant()
    def the_state_is_the_fold_of_the_events(self) -> None:
        state = None
        for number, event in enumerate(self.events, start=1):
            assert event.cursor == number
            state = rules.apply(state, event.kind, event.data, event.at, workspace_id="ws_1")
            assert state == event.state
        assert not self.events or state == self.state

    @invariant()
    def its_files_never_change_their_host(self) -> None:
        hosts = [event.state.host for event in self.events if event.state.host is not None]
        assert len(set(hosts)) <= 1

    @invariant()
    def an_event_survives_the_wire(self) -> None:
        if self.events:
            assert WORKSPACE.decode(msgspec.json.encode(self.events[-1])).state == self.state


WorkspaceMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestWorkspaceMachine = WorkspaceMachine.TestCase
