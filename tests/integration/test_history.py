"""The history service: records as control shows them, pages, fresh answers, and nothing of anybody else's."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.setup import ensure_topology
from helmr import subjects
from helmr.errors import NotFound, TimedOut, UsageError
from helmr.models import Deployment, Event, Run, Session, Workspace, event_record
from helmr.subjects import Scope
from store import answers
from store import history as service
from store.projector import Projector
from store.reads import NOUNS
from tests.integration.history import ask, history, publish, publish_log, reading, store_of
from tests.lives import SCOPE, START, Life, lives, session, workspace

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("projector")]

OTHER = Scope("other", "dev")


@pytest.fixture
async def projector(nc: Nats, tmp_path: Path) -> AsyncIterator[Projector]:
    """A running history over an empty log."""
    await ensure_topology(nc)
    async with history(nc, tmp_path / "h") as projector:
        yield projector


async def test_a_run_is_the_record_control_shows(nc: Nats) -> None:
    told = lives(8)
    await publish(nc, [message for life in told for message in life.published()])
    for life in told:
        answer = await ask(nc, "run", {"id": life.id, "fresh": True})
        assert msgspec.convert(answer, Run, strict=False) == life.record
        assert list(answer) == list(Run.__struct_fields__)


async def test_sessions_workspaces_and_deployments_are_records(nc: Nats) -> None:
    life = Life().queued().leased()
    await publish(nc, session(life) + workspace(life, live=True) + life.published())
    made = Deployment(
        id="dep_1",
        version="20260301.1",
        project=SCOPE.project,
        environment=SCOPE.environment,
        content_hash="abc",
        archive="def",
        archive_bytes=10,
        created_at=START,
        index={"tasks": [{"id": "review"}]},
        current=True,
    )
    bucket = await nc.jetstream().key_value(topology.CONFIG_BUCKET)
    await bucket.put(f"deployment.{SCOPE}.dep_1", msgspec.json.encode(made))
    await bucket.put(f"current.{SCOPE}", b"dep_1")
    found = msgspec.convert(
        await ask(nc, "session", {"id": life.spec.session_id, "fresh": True}), Session, strict=False
    )
    assert (found.activity, found.run_id, found.tags, found.metadata) == (
        "running",
        life.id,
        ("nightly",),
        {"who": "ada"},
    )
    tree = msgspec.convert(await ask(nc, "workspace", {"id": life.spec.workspace_id}), Workspace, strict=False)
    assert (tree.state, tree.worker) == ("live", "wrk_1")
    (deployment,) = (await ask(nc, "deployments", {}))["deployments"]
    assert msgspec.convert(deployment, Deployment, strict=False) == made
    assert len((await ask(nc, "sessions", {"status": "open"}))["sessions"]) == 1
    assert (await ask(nc, "workspaces", {"state": ["stopped"]}))["workspaces"] == []


@pytest.mark.parametrize(
    ("request_body", "expected"),
    [
        ({}, [7, 6, 5, 4, 3, 2, 1, 0]),
        ({"status": "failed"}, [7, 2]),
        ({"status": ["waiting", "cancelled"]}, [5, 4]),
        ({"task": "task-1"}, [7, 4, 1]),
        ({"task": "task-1", "status": "failed"}, [7]),
        ({"since": (START + timedelta(minutes=5)).isoformat()}, [7, 6, 5]),
        ({"since": "2026-03-01T12:06:00Z"}, [7, 6]),
        ({"since": 60}, []),
        ({"since": "2h"}, []),
        ({"session": "ses_none"}, []),
        ({"limit": 2}, [7, 6]),
    ],
)
async def test_runs_are_listed_newest_first(nc: Nats, request_body: dict[str, Any], expected: list[int]) -> None:
    told = lives(8)
    await publish(nc, [message for life in told for message in life.published()])
    answer = await ask(nc, "runs", {**request_body, "fresh": True})
    assert [run["id"] for run in answer["runs"]] == [told[number].id for number in expected]
    assert (answer["next"] is not None) == ("limit" in request_body)


async def test_pages_follow_one_another(nc: Nats) -> None:
    told = [Life(start=START).queued() for _ in range(7)]  # all at the same time: the id decides
    await publish(nc, [message for life in told for message in life.published()])
    seen: list[str] = []
    before = None
    while True:
        answer = await ask(nc, "runs", {"limit": 3, "before": before, "fresh": True})
        seen += [run["id"] for run in answer["runs"]]
        before = answer["next"]
        if before is None:
            break
    assert seen == sorted((life.id for life in told), reverse=True)


async def test_a_page_fits_into_a_message(nc: Nats) -> None:
    told = [Life(payload={"text": "x" * 300_000}, start=START + timedelta(seconds=n)).queued() for n in range(5)]
    for life in told:
        await publish(nc, life.published())
    answer = await ask(nc, "runs", {"fresh": True})
    assert [run["id"] for run in answer["runs"]] == [told[4].id, told[3].id]
    assert (await ask(nc, "runs", {"before": answer["next"]}))["runs"][0]["id"] == told[2].id


async def test_events_are_those_of_the_log(nc: Nats) -> None:
    life = Life().queued().leased().waits().add("step", {"name": "a", "result": {"deep": [1, {"x": None}]}}).succeeds()
    await publish(nc, lives(8)[0].published() + life.published())
    answer = await ask(nc, "events", {"run_id": life.id, "fresh": True})
    assert msgspec.convert(answer["events"], list[Event], strict=False) == [event_record(e) for e in life.events]
    assert answer["terminal"]
    page = await ask(nc, "events", {"run_id": life.id, "after": 2, "limit": 3})
    assert [event["cursor"] for event in page["events"]] == [3, 4, 5]
    assert not page["terminal"]


async def test_logs_come_in_pages_over_days(nc: Nats, projector: Projector, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life().queued()
    await publish(nc, life.published())
    now = datetime.now(UTC)
    for day, body in enumerate((b"one", b"two\xff", b"three")):
        today = (now + timedelta(days=day)).strftime("%Y%m%d")
        monkeypatch.setattr("store.steps.day_of", lambda _message, today=today: today)
        await publish_log(nc, life.id, body, offset=day)
        await projector.fresh(logs=True)
    monkeypatch.setattr("store.reads._LOG_TAIL", timedelta(days=3))
    assert len(store_of(projector).logs.days()) == 3
    whole = await ask(nc, "logs", {"run_id": life.id, "fresh": True})
    assert [base64.b64decode(chunk["data"]) for chunk in whole["chunks"]] == [b"one", b"two\xff", b"three"]
    assert not whole["more"]
    first = await ask(nc, "logs", {"run_id": life.id, "limit": 2})
    assert ([chunk["offset"] for chunk in first["chunks"]], first["more"]) == ([0, 1], True)
    rest = await ask(nc, "logs", {"run_id": life.id, "after_seq": first["chunks"][-1]["seq"]})
    assert [chunk["offset"] for chunk in rest["chunks"]] == [2]
    assert (await ask(nc, "logs", {"run_id": life.id, "stream": "stderr"}))["chunks"] == []
    assert (await ask(nc, "logs", {"run_id": life.id, "attempt": 2}))["chunks"] == []


async def test_large_logs_come_in_pages_that_fit(nc: Nats) -> None:
    life = Life().queued()
    await publish(nc, life.published())
    for number in range(20):
        await publish_log(nc, life.id, bytes([number]) * 64_000, offset=number * 64_000)
    read, after, pages = b"", 0, 0
    while True:
        answer = await ask(nc, "logs", {"run_id": life.id, "after_seq": after, "fresh": True})
        read += b"".join(base64.b64decode(chunk["data"]) for chunk in answer["chunks"])
        pages += 1
        if not answer["more"]:
            break
        after = answer["chunks"][-1]["seq"]
    assert read == b"".join(bytes([number]) * 64_000 for number in range(20))
    assert pages > 1


async def test_ids_are_resolved_by_prefix(nc: Nats) -> None:
    told = [Life(start=START + timedelta(minutes=n)).queued() for n in range(12)]
    await publish(nc, [message for life in told for message in life.published()])
    await publish(nc, session(told[0]))

    async def resolve(entity: str, **body: Any) -> list[str]:
        found: list[str] = (await ask(nc, "resolve", {"entity": entity, "fresh": True, **body}))["ids"]
        return found

    assert await resolve("run", prefix=told[3].id[:-1]) == [told[3].id]
    assert await resolve("run", last=True) == [told[11].id]
    assert len(await resolve("run", prefix="run_")) == 10
    assert await resolve("run", prefix="%") == []
    assert await resolve("session", prefix=f"ext-{told[0].id}") == [told[0].spec.session_id]
    assert await resolve("deployment", last=True) == []
    with pytest.raises(UsageError, match="needs a prefix"):
        await resolve("run")


async def test_nobody_sees_another_scope(nc: Nats) -> None:
    mine, theirs = Life().queued(), Life(scope=OTHER).queued()
    await publish(nc, mine.published() + theirs.published() + session(theirs) + workspace(theirs))
    await publish_log(nc, theirs.id, b"secret", scope=OTHER)
    assert [run["id"] for run in (await ask(nc, "runs", {"fresh": True}))["runs"]] == [mine.id]
    for verb, body in (
        ("run", {"id": theirs.id}),
        ("session", {"id": theirs.spec.session_id}),
        ("workspace", {"id": theirs.spec.workspace_id}),
        ("events", {"run_id": theirs.id}),
        ("logs", {"run_id": theirs.id}),
        ("runs", {"before": theirs.id}),
    ):
        with pytest.raises(NotFound):
            await ask(nc, verb, body)
    assert (await ask(nc, "resolve", {"entity": "run", "prefix": theirs.id}))["ids"] == []
    assert (await ask(nc, "run", {"id": theirs.id}, scope=OTHER))["project"] == "other"


async def test_fresh_answers_include_what_was_just_stored(nc: Nats) -> None:
    for _ in range(20):
        life = Life().queued()
        await publish(nc, life.published())
        assert (await ask(nc, "run", {"id": life.id, "fresh": True}))["id"] == life.id


async def test_a_history_that_stands_still_says_so(
    nc: Nats, projector: Projector, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with projector.history.commit:
        life = Life().queued()
        await publish(nc, life.published())
        with monkeypatch.context() as impatient:
            impatient.setattr(service, "FRESHNESS_DEADLINE", 0.3)
            with pytest.raises(TimedOut, match="not caught up"):
                await ask(nc, "runs", {"fresh": True})
        status = (await ask(nc, "status", {}))["streams"][topology.RUNS]
        assert (status["applied"], status["last"]) == (0, 1)
    assert len((await ask(nc, "runs", {"fresh": True}))["runs"]) == 1
    assert (await ask(nc, "status", {}))["streams"][topology.RUNS] == {"applied": 1, "last": 1, "lag_seconds": 0.0}


async def test_the_lag_counts_from_what_is_waiting_not_from_before_a_pause(nc: Nats, projector: Projector) -> None:
    await publish(nc, Life().queued().published())
    await projector.fresh()
    async with projector.history.commit:
        began = datetime.now(UTC)
        await publish(nc, Life().queued().published() + Life().queued().published())
        lag = (await ask(nc, "status", {}))["streams"][topology.RUNS]["lag_seconds"]
        assert 0 <= lag <= (datetime.now(UTC) - began).total_seconds() + 0.001  # it is rounded
        # Of what has been deleted, nothing is waited for.
        stream = nc.jetstream()
        await stream.delete_msg(topology.RUNS, 2)
        third = await stream.get_msg(topology.RUNS, 3)
        assert await projector.history.readers[topology.RUNS].stored_after(1) == third.time
        assert await projector.history.readers[topology.RUNS].stored_after(3) is None


async def test_a_slow_question_is_interrupted(nc: Nats, projector: Projector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "DEADLINE", 0.3)
    monkeypatch.setitem(
        NOUNS, "run", NOUNS["run"]._replace(view="(SELECT r.* FROM runs r, range(1000000000) a, range(1000) b)")
    )
    await publish(nc, Life().queued().published())
    await projector.fresh()
    with pytest.raises(TimedOut, match="did not answer"):
        await ask(nc, "runs", {})


@pytest.mark.parametrize(
    ("verb", "body", "message"),
    [
        ("runs", {"limit": 0}, "limit is 0"),
        ("runs", {"limit": 5000}, "limit is 5000"),
        ("runs", {"limit": "x"}, "bad history runs request"),
        ("runs", {"since": "2026-99-99T00:00"}, "neither a time nor a duration"),
        ("runs", {"since": "soon"}, "not a duration"),
        ("run", {}, "bad history run request"),
        ("events", {"run_id": "run_1", "limit": -1}, "limit is -1"),
        ("resolve", {"entity": "cat", "prefix": "x"}, "bad history resolve request"),
    ],
)
async def test_bad_requests_are_explained(nc: Nats, verb: str, body: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        await ask(nc, verb, body)


async def test_every_record_can_be_read_from_its_view(projector: Projector) -> None:
    with reading(store_of(projector)) as cursor:
        for noun in NOUNS.values():
            assert cursor.execute(f"{noun.select} LIMIT 0").fetchall() == []


async def test_a_request_of_nobodys_verb_has_no_responders(nc: Nats) -> None:
    with pytest.raises(Exception, match="no responders"):
        await nc.request(subjects.api(SCOPE, "history", "nothing"), b"", timeout=2)
