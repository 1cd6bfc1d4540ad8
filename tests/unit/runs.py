"""What the tests of the run's rules share: a spec, a clock, and a run told as a list of steps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from helmr.events import Draft, RunSpec, RunState
from helmr.reducers import run as rules
from helmr.reducers import run_fold

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def spec(**changes: Any) -> RunSpec:
    """A spec with nothing special about it."""
    fixed: dict[str, Any] = {
        "session_id": "ses_1",
        "workspace_id": "ws_1",
        "deployment_id": "dep_1",
        "deployment_version": "20260301.1",
        "task_id": "hello",
    }
    return RunSpec(**fixed | changes)


def after(state: RunState | None, draft: Draft | None, second: float = 0) -> RunState:
    """The state after a draft, ``second`` seconds after the start."""
    assert draft is not None
    return run_fold.apply(state, draft.kind, draft.data, START + timedelta(seconds=second), run_id="run_1")


def queued(**changes: Any) -> RunState:
    """A run that has just been started."""
    return after(None, rules.create(spec(**changes), cause="start", lane="default"))


def leased(state: RunState, worker: str = "wrk_a", second: float = 0) -> RunState:
    """The run in a worker's hands."""
    assert state.dispatch is not None
    return after(state, rules.lease(state, worker=worker, dispatch=state.dispatch), second)


def running(**changes: Any) -> RunState:
    """A run that executes."""
    return leased(queued(**changes))


def waiting() -> RunState:
    """A run that waits for a timer."""
    return after(running(), Draft(kind="waiting", data={"kind": "timer", "due": "2026-03-01T13:00:00Z"}), 10)


def ended(kind: str = "succeeded") -> RunState:
    """A run that is over."""
    return after(running(), Draft(kind=kind, data={}), 10)
