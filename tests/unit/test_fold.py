"""The fold from messages to rows: what it says of a run is what the log says, wherever a batch ends."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import pytest

from bus.reader import Message
from helmr import chunks, subjects
from helmr.events import ArtifactRef
from helmr.models import Deployment, Run
from store import tables
from store.fold import Fold, OpenRun, restore
from store.log_fold import day_of, row_of
from store.staging import staged
from tests.lives import SCOPE, START, Life, access, lives, messages, record, session, token, workspace

Rows = dict[str, list[dict[str, Any]]]
TABLES = {table.name: table for table in tables.HISTORY_TABLES}


def fold(published: list[Message], batches: int = 10**6, *, open_runs: dict[str, OpenRun] | None = None) -> Rows:
    """The rows of all tables; a run's later row takes the place of its earlier one."""
    found: Rows = {}
    folded = Fold(open_runs=open_runs or {})
    for start in range(0, len(published), batches):
        for message in published[start : start + batches]:
            folded.event(message)
        for name, rows in folded.take().items():
            found.setdefault(name, []).extend(dict(zip(TABLES[name].names, row, strict=True)) for row in rows)
    return found


def latest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row, with what only the first one tells."""
    kept = {name: rows[0][name] for name in tables.RUN_SPEC_COLUMNS}
    return {**rows[-1], **kept}


def as_run(row: dict[str, Any]) -> Run:
    """The record of a stored row, by the names of its columns alone."""
    values = {name: row[name] for name in Run.__struct_fields__}
    for name in ("payload", "output", "output_artifact", "failure", "metadata", "cancel_requested", "pending_wait"):
        values[name] = msgspec.json.decode(values[name]) if values[name] is not None else None
    return msgspec.convert(values, Run, strict=False)


@pytest.mark.parametrize("batches", [1, 2, 3, 1000])
@pytest.mark.parametrize("life", lives(8), ids=lambda life: life.events[-1].kind)
def test_a_run_row_is_the_run_record(life: Life, batches: int) -> None:
    rows = fold(messages(life.published()), batches)
    assert as_run(latest(rows["runs_live"])) == life.record


def test_the_row_of_a_run_with_large_values_has_the_references() -> None:
    reference = ArtifactRef(digest="ab" * 32, bytes=600_000)
    end = {"output_artifact": msgspec.to_builtins(reference), "exit_code": 0, "logs": {}}
    life = Life(payload=None, payload_artifact=reference).queued().leased().add("succeeded", end)
    record = as_run(latest(fold(messages(life.published()), 1)["runs_live"]))
    assert record == life.record
    assert (record.output, record.output_artifact) == (None, reference)
    assert record.payload == {"$artifact": {"digest": "ab" * 32, "bytes": 600_000}}


@pytest.mark.parametrize("life", lives(8), ids=lambda life: life.events[-1].kind)
def test_where_a_batch_ends_changes_no_row(life: Life) -> None:
    published = messages(life.published())
    whole, single = fold(published), fold(published, 1)
    assert latest(whole.pop("runs_live")) == latest(single.pop("runs_live"))
    assert whole == single


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_restart_goes_on_counting(cut: int) -> None:
    life = Life().queued().leased().waits().retries().waits("wait_timed_out", seconds=5).succeeds()
    published = messages(life.published())
    before = fold(published[:cut])
    row = latest(before["runs_live"])
    loaded = restore([{**row, "pending_wait": row["pending_wait"] if row["status"] == "waiting" else None}])
    after = fold(published[cut:], open_runs=loaded)
    whole = fold(published)
    for name in ("attempts_closed", "waits_closed", "events"):
        assert before.get(name, []) + after.get(name, []) == whole[name]
    final = {name: value for name, value in after["runs_live"][-1].items() if name not in tables.RUN_SPEC_COLUMNS}
    assert final == {name: whole["runs_live"][-1][name] for name in final}


def test_attempts_are_one_row_per_try() -> None:
    life = Life().queued().leased("wrk_1").retries("task_exit").waits().fails("out_of_memory", "too big")
    found = fold(messages(life.published()))["attempts_closed"]
    told = [(row["attempt"], row["worker"], row["leases"], row["outcome"], row["failure_code"]) for row in found]
    assert told == [(1, "wrk_1", 1, "failed", "task_exit"), (2, "wrk_1", 2, "failed", "out_of_memory")]
    assert found[1]["failure_message"] == "too big"
    assert found[0]["active_seconds"] == pytest.approx(2.0)


def test_waits_have_beginning_end_and_outcome() -> None:
    life = Life().queued().leased().waits(seconds=30).waits("wait_timed_out", seconds=5).succeeds()
    rows = fold(messages(life.published()))
    assert [row["outcome"] for row in rows["waits_closed"]] == ["completed", "timed_out"]
    first = rows["waits_closed"][0]
    spent = datetime.fromisoformat(first["ended_at"]) - datetime.fromisoformat(first["began_at"])
    assert spent.total_seconds() == 30.0
    assert (rows["runs_live"][0]["waits"], rows["runs_live"][0]["wait_seconds"]) == (2, 35.0)


def test_a_run_that_ends_while_waiting_ends_its_wait() -> None:
    life = Life().queued().leased().add("waiting", {"kind": "timer"}).add("cancelled", {"reason": "enough"}, after=7)
    rows = fold(messages(life.published()))
    assert [(row["kind"], row["outcome"]) for row in rows["waits_closed"]] == [("timer", "cancelled")]
    assert rows["attempts_closed"][0]["outcome"] == "cancelled"


def test_an_ended_run_is_forgotten() -> None:
    folded = Fold()
    for message in messages(Life().queued().leased().succeeds().published()):
        folded.event(message)
    assert folded.open_runs == {}


def test_events_keep_their_data_and_hot_columns() -> None:
    life = Life().queued().leased("wrk_9").add("step", {"name": "fetch", "result": {"b": 1, "a": [True, None]}})
    events = fold(messages(life.published()))["events"]
    assert [(row["cursor"], row["kind"]) for row in events] == [
        (1, "queued"),
        (2, "leased"),
        (3, "started"),
        (4, "step"),
    ]
    assert (events[0]["reason"], events[1]["worker"], events[3]["name"]) == ("start", "wrk_9", "fetch")
    assert msgspec.json.decode(events[3]["data"]) == {"name": "fetch", "result": {"b": 1, "a": [True, None]}}


def test_data_of_an_unexpected_type_is_no_obstacle() -> None:
    life = Life().queued().leased().add("step", {"name": {"not": "text"}, "worker": 7})
    events = fold(messages(life.published()))["events"]
    assert events[-1]["name"] is None
    assert msgspec.json.decode(events[-1]["data"])["worker"] == 7


@pytest.mark.parametrize(
    "message",
    [
        Message(1, "helmr.timer.acme.dev.run.run_1.ttl", 0, None, b""),
        Message(1, "helmr.ev.acme.dev.queue.q.admitted", 0, None, b"{}"),
    ],
)
def test_foreign_subjects_are_passed_over(message: Message) -> None:
    assert fold([message]) == {}


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b"[]", b'{"cursor": "x"}', b"\xff\xfe"])
def test_what_cannot_be_understood_is_refused_whole(body: bytes) -> None:
    folded = Fold()
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        folded.event(Message(1, "helmr.ev.acme.dev.run.run_1.started", 0, None, body))
    assert folded.take() == {}


def test_sessions_and_workspaces_are_their_latest_state() -> None:
    life = Life().queued()
    rows = fold(messages(session(life, ends="closed") + workspace(life, live=True)))
    (kept,) = rows["sessions_live"]
    assert (kept["id"], kept["status"], kept["reason"], kept["cursor"]) == (life.spec.session_id, "closed", "done", 2)
    (tree,) = rows["workspaces"]
    assert (tree["id"], tree["state"], tree["worker"], tree["host"]) == (
        life.spec.workspace_id,
        "live",
        "wrk_1",
        "host_1",
    )


def test_tokens_of_both_kinds_are_their_latest_state() -> None:
    rows = fold(messages(token("build", data={"ok": True}) + access(uses=1)))
    (kept,) = rows["tokens"]
    assert (kept["status"], kept["tags"], kept["data"], kept["cursor"]) == ("completed", ["build"], '{"ok":true}', 2)
    (allowed,) = rows["access"]
    assert (allowed["status"], allowed["action"], allowed["uses"], allowed["used"]) == ("used_up", "append", 1, 1)
    assert "hash" not in allowed


def test_records_are_appended() -> None:
    folded = Fold()
    subject, body = record("ses_1", 3, {"approved": True})
    folded.record(Message(9, subject, 0, None, body))
    (row,) = folded.take()["records"]
    told = dict(zip(tables.RECORDS.names, row, strict=True))
    assert (told["seq"], told["session_id"], told["sequence"], told["data"]) == (9, "ses_1", 3, '{"approved":true}')


def test_the_current_deployment_is_the_last_one_named() -> None:
    made = Deployment(
        id="dep_1",
        version="20260301.1",
        project="acme",
        environment="dev",
        content_hash="abc",
        archive="def",
        archive_bytes=10,
        created_at=START,
        index={"tasks": []},
    )
    folded = Fold()
    key = "$KV.config.deployment.acme.dev.dep_1"
    folded.config(Message(1, key, 0, None, msgspec.json.encode(made)))
    folded.config(Message(2, "$KV.config.current.acme.dev", 0, None, b"dep_0"))
    folded.config(Message(3, "$KV.config.current.acme.dev", 0, None, b"dep_1"))
    folded.config(Message(4, "$KV.config.version.acme.dev.20260301-1", 0, None, b"1"))
    folded.config(Message(5, key, 0, {"KV-Operation": "DEL"}, b""))
    rows = folded.take()
    assert rows["deployments_current"] == [("acme", "dev", "dep_1", 3)]
    assert [row[0] for row in rows["deployments_stored"]] == ["dep_1"]


@pytest.mark.parametrize(
    ("body", "text", "raw"),
    [(b"hello\n", "hello\n", None), ("é".encode(), "é", None), (b"\xc3", "�", b"\xc3"), (b"", "", None)],
)
def test_log_chunks_keep_every_byte(body: bytes, text: str, raw: bytes | None) -> None:
    headers = {chunks.HEADER_OFFSET: "5", chunks.HEADER_DISPATCH: "2", chunks.HEADER_AT: START.isoformat()}
    subject = subjects.log(SCOPE, "run_1", 3, "stdout")
    row = dict(zip(tables.LOGS.names, row_of(Message(8, subject, 10**18, headers, body)), strict=True))
    assert (row["text"], row["raw"], row["bytes"]) == (text, raw, len(body))
    assert (row["attempt"], row["dispatch_attempt"], row["byte_offset"], row["stream"]) == (3, 2, 5, "stdout")


def test_the_day_of_a_chunk_is_when_it_was_stored() -> None:
    stored = int(datetime.fromisoformat("2026-03-01T23:59:59.999999+00:00").timestamp() * 1e9)
    assert day_of(Message(1, "", stored, None, b"")) == "20260301"
    assert day_of(Message(1, "", stored + 1_000_000, None, b"")) == "20260302"


def test_every_row_fits_its_table() -> None:
    published = [message for life in lives(8) for message in life.published()]
    folded = Fold()
    for message in messages(published):
        folded.event(message)
    for name, rows in folded.take().items():
        assert staged(TABLES[name], rows).num_rows == len(rows)
