"""The life of an exec, rule by rule."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from helmr.errors import Conflict
from helmr.events import Draft, ExecState
from helmr.models import exec_record
from helmr.reducers import exec as rules

_AT = datetime(2026, 3, 1, tzinfo=UTC)
_LATER = datetime(2026, 3, 2, tzinfo=UTC)


def _after(state: ExecState | None, draft: Draft | None) -> ExecState:
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, _LATER if state else _AT, exec_id="exec_1")


def _created(asked: dict[str, Any] | None = None) -> ExecState:
    draft = rules.create(
        workspace_id="ws_1", worker="wrk_a", argv=("ls",), cwd=None, terminal=False, kept=True, asked=asked or {}
    )
    return _after(None, draft)


def _running() -> ExecState:
    return _after(_created(), rules.start(_created(), worker="wrk_a"))


def test_it_begins_for_one_worker_and_ends_with_an_exit_code() -> None:
    state = _running()
    assert (state.status, state.worker, state.started_at, state.live) == ("running", "wrk_a", _LATER, True)
    facts = {"exit_code": 3, "signal": None, "cause": "exit", "stdout": 10, "stderr": 0}
    ended = _after(state, rules.exit_(state, facts))
    assert (ended.status, ended.exit_code, ended.stdout, ended.stderr) == ("exited", 3, 10, 0)
    assert (ended.finished_at, ended.live, ended.cursor) == (_LATER, False, 3)


def test_a_signal_counts_as_shells_count_it() -> None:
    ended = _after(_running(), rules.exit_(_running(), {"exit_code": None, "signal": 15, "cause": "cancel"}))
    record = exec_record("acme", "dev", ended)
    assert (record.exit_code, record.signal, record.ended) == (143, 15, True)


def test_it_is_started_once_and_only_where_it_was_meant_to_be() -> None:
    with pytest.raises(Conflict, match="running"):
        rules.start(_running(), worker="wrk_a")
    with pytest.raises(Conflict, match="wrk_a"):
        rules.start(_created(), worker="wrk_b")


def test_the_end_absorbs() -> None:
    lost = _after(_running(), rules.lose(_running(), reason="its worker was lost"))
    assert (lost.status, lost.reason, exec_record("acme", "dev", lost).exit_code) == (
        "lost",
        "its worker was lost",
        None,
    )
    assert rules.exit_(lost, {"exit_code": 0}) is None
    assert rules.fail(lost, reason="late") is None
    assert rules.lose(lost, reason="again") is None
    for kind in ("started", "exited", "failed", "lost"):
        with pytest.raises(Conflict, match="lost"):
            rules.apply(lost, kind, {}, _LATER)


def test_what_never_began_failed() -> None:
    failed = _after(_created(), rules.fail(_created(), reason="no image"))
    assert (failed.status, failed.reason, failed.started_at) == ("failed", "no image", None)


@pytest.mark.parametrize("kind", ["started", "exited", "nonsense"])
def test_nothing_precedes_the_beginning(kind: str) -> None:
    with pytest.raises(Conflict, match="first event"):
        rules.apply(None, kind, {}, _AT)


def test_nothing_else_may_follow() -> None:
    with pytest.raises(Conflict, match="cannot follow"):
        rules.apply(_running(), "nonsense", {}, _LATER)


def test_a_repetition_is_known_by_all_that_was_asked_for() -> None:
    asked = {"argv": ["ls"], "env": {"A": "secret"}}
    state = _created(asked)
    assert state.fingerprint == rules.fingerprint(asked)
    assert state.fingerprint != rules.fingerprint(asked | {"env": {"A": "other"}})
    draft = rules.create(
        workspace_id="ws_1", worker="w", argv=("ls",), cwd=None, terminal=False, kept=True, asked=asked
    )
    assert "secret" not in repr(draft)
