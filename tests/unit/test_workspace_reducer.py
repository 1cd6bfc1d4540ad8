"""The life of a workspace, rule by rule, and where its runs belong."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from helmr.errors import Conflict, TooLarge
from helmr.events import Draft, WorkspaceEvent, WorkspaceState
from helmr.models import workspace_record
from helmr.reducers import workspace as rules

_AT = datetime(2026, 3, 1, tzinfo=UTC)
_LATER = datetime(2026, 3, 2, tzinfo=UTC)


def _after(state: WorkspaceState | None, draft: Draft | None) -> WorkspaceState:
    assert draft is not None
    return rules.apply(state, draft.kind, draft.data, _LATER if state else _AT, workspace_id="ws_1")


def _created() -> WorkspaceState:
    return _after(None, rules.create(sandbox="box", fingerprint="f", deployment_id="dep_1", mount_path="/w"))


def _live(worker: str = "wrk_a", host: str = "host_1") -> WorkspaceState:
    return _after(_created(), rules.materialize(_created(), worker=worker, host=host, ref="r"))


def _stopped() -> WorkspaceState:
    return _after(_live(), rules.stop(_live(), worker="wrk_a", reason="idle"))


def _deleted() -> WorkspaceState:
    return _after(_live(), Draft(kind="deleted"))


@pytest.mark.parametrize(
    ("state", "shown", "worker", "host"),
    [
        (_created(), "stopped", None, None),
        (_live(), "live", "wrk_a", "host_1"),
        (_stopped(), "stopped", None, "host_1"),
        (_deleted(), "deleted", None, None),
    ],
    ids=["created", "live", "stopped", "deleted"],
)
def test_the_record_says_where_it_is(state: WorkspaceState, shown: str, worker: str | None, host: str | None) -> None:
    record = workspace_record("acme", "dev", state)
    assert (record.state, record.worker, record.host, record.mount_path) == (shown, worker, host, "/w")
    assert record.created_at == _AT


@pytest.mark.parametrize("kind", ["materialized", "stopped", "deleted"])
def test_a_workspace_begins_created(kind: str) -> None:
    with pytest.raises(Conflict):
        rules.apply(None, kind, {"worker": "w", "host": "h"}, _AT, workspace_id="ws_1")


@pytest.mark.parametrize("kind", ["created", "materialized", "stopped", "deleted"])
def test_nothing_follows_its_deletion(kind: str) -> None:
    with pytest.raises(Conflict) as refused:
        rules.apply(_deleted(), kind, {"worker": "w", "host": "h"}, _AT)
    assert refused.value.details["status"] == "deleted"


@pytest.mark.parametrize("kind", ["created", "unheard_of"])
def test_it_is_created_once(kind: str) -> None:
    with pytest.raises(Conflict):
        rules.apply(_created(), kind, {}, _AT)


def test_two_workers_do_not_bring_it_to_life() -> None:
    with pytest.raises(Conflict) as refused:
        rules.materialize(_live(), worker="wrk_b", host="host_1", ref="")
    assert refused.value.details["worker"] == "wrk_a"


def test_the_worker_it_is_live_on_may_do_so_again() -> None:
    assert rules.materialize(_live(), worker="wrk_a", host="host_1", ref="new").data["ref"] == "new"


def test_a_worker_that_is_gone_is_evicted() -> None:
    state = _after(_live(), rules.materialize(_live(), worker="wrk_b", host="host_1", ref="", evict="wrk_a"))
    assert state.materialization is not None
    assert state.materialization.worker == "wrk_b"


@pytest.mark.parametrize("state", [_live(), _stopped()], ids=["live", "stopped"])
def test_its_files_do_not_move_to_another_host(state: WorkspaceState) -> None:
    with pytest.raises(Conflict) as refused:
        rules.materialize(state, worker="wrk_a", host="host_2", ref="")
    assert refused.value.details["host"] == "host_1"


@pytest.mark.parametrize("state", [_created(), _stopped(), _live("wrk_b")], ids=["created", "stopped", "elsewhere"])
def test_only_the_worker_it_is_live_on_stops_it(state: WorkspaceState) -> None:
    assert rules.stop(state, worker="wrk_a", reason="r") is None


@pytest.mark.parametrize(
    ("state", "alive", "lane"),
    [
        (None, {"wrk_a"}, "default"),
        (_created(), {"wrk_a"}, "default"),
        (_live(), {"wrk_a"}, "@wrk_a"),
        (_live(), set(), "~host_1"),
        (_stopped(), {"wrk_a"}, "~host_1"),
        (_deleted(), {"wrk_a"}, "default"),
    ],
    ids=["none", "created", "live", "worker gone", "stopped", "deleted"],
)
def test_a_run_goes_where_the_files_are(state: WorkspaceState | None, alive: set[str], lane: str) -> None:
    assert rules.lane(state, group="default", alive=alive) == lane


def test_a_workspace_can_begin_with_tags_and_metadata() -> None:
    box: dict[str, Any] = {"sandbox": "box", "fingerprint": "f", "deployment_id": "dep_1", "mount_path": "/w"}
    state = _after(None, rules.create(**box, tags=["b", "a", "b"], metadata={"owner": "ada", "n": None}))
    assert (state.tags, state.metadata) == (("a", "b"), {"owner": "ada"})
    with pytest.raises(TooLarge, match="at most 10 tags"):
        rules.create(**box, tags=[*"abcdefghijk"])
    with pytest.raises(TooLarge, match="a workspace has at most 16384"):
        rules.create(**box, metadata={"text": "x" * 16 * 1024})


@pytest.mark.parametrize(
    ("given", "tags", "metadata"),
    [
        ({}, ("now",), {"owner": "ada"}),
        ({"tags": ["mine"]}, ("mine",), {"owner": "ada"}),
        ({"metadata": {"owner": "bob"}}, ("now",), {"owner": "bob"}),
        ({"tags": [], "metadata": {}}, (), {}),
    ],
    ids=["nothing", "tags", "metadata", "none"],
)
def test_a_fork_has_what_is_said_of_its_source_now_unless_given(
    given: dict[str, Any], tags: tuple[str, ...], metadata: dict[str, Any]
) -> None:
    then = _update(_live(), tag=("then",), metadata={"owner": "eve"})
    made = {"version": "ver_1", "manifest": "m"}
    event = WorkspaceEvent(cursor=3, id="evt_1", workspace_id="ws_1", kind="captured", at=_LATER, data=made, state=then)
    source = _update(then, tag=("now",), untag=("then",), metadata={"owner": "ada"})
    fork = _after(None, rules.fork(event, source, **given))
    assert (fork.tags, fork.metadata, fork.version) == (tags, metadata, "ver_1")


_OTHER = {"sandbox": "large", "fingerprint": "g", "deployment_id": "dep_2", "mount_path": "/work"}
_SAME = {"sandbox": "box", "fingerprint": "f", "deployment_id": "dep_2", "mount_path": "/w"}


def _update(state: WorkspaceState, **changes: Any) -> WorkspaceState:
    return _after(state, rules.update(state, rules.Changes(**changes)))


def test_an_update_changes_what_it_names_and_nothing_else() -> None:
    first = _update(_live(), tag=("b", "a"), metadata={"owner": "ada", "n": 1})
    second = _update(first, tag=("c",), untag=("a", "x"), metadata={"n": None, "phase": [2]})
    assert (first.tags, first.metadata) == (("a", "b"), {"owner": "ada", "n": 1})
    assert (second.tags, second.metadata) == (("b", "c"), {"owner": "ada", "phase": [2]})
    assert (second.materialization, second.sandbox, second.host) == (_live().materialization, "box", "host_1")
    record = workspace_record("acme", "dev", second)
    assert (record.tags, record.metadata, record.deployment_id) == (("b", "c"), second.metadata, "dep_1")


def test_what_a_workspace_is_already_is_no_event() -> None:
    state = _update(_created(), tag=("a",), metadata={"n": 1})
    same = rules.Changes(tag=("a",), untag=("z",), metadata={"n": 1, "m": None}, sandbox=_SAME)
    assert rules.update(state, same) is None
    assert rules.update(_live(), rules.Changes(sandbox=_SAME)) is None


def test_another_sandbox_is_for_the_next_start() -> None:
    changed = _update(_stopped(), sandbox=_OTHER)
    assert (changed.sandbox, changed.fingerprint, changed.deployment_id) == ("large", "g", "dep_2")
    assert (changed.mount_path, changed.host, changed.epoch) == ("/work", "host_1", 0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sandbox": _OTHER}, Conflict),
        ({"tag": tuple("abcdefghijk")}, TooLarge),
        ({"tag": ("x" * 129,)}, TooLarge),
        ({"metadata": {"text": "x" * 16 * 1024}}, TooLarge),
    ],
    ids=["live", "tags", "tag", "metadata"],
)
def test_an_update_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        rules.update(_live(), rules.Changes(**changes))
