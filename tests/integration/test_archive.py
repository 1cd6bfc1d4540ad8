"""Closed days in Parquet: read as one with what is in the database, whole after a kill at any step, and readable by others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow.parquet
import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.reader import Message
from bus.setup import ensure_topology
from helmr import subjects
from helmr.index import Index, RetentionEntry
from helmr.models import Deployment
from helmr.subjects import Scope
from store import archive as archives
from store import parquet, reads
from store.archive import Archive
from store.home import Home
from store.projector import Projector
from store.retention import Retention
from store.sinks import Store
from store.transfer import export, import_
from store.verify import compare, verify
from tests.integration.history import ask, history, publish, publish_log, reading, store_of, table
from tests.lives import SCOPE, START, Life, Published, lives

pytestmark = pytest.mark.anyio

#: All of START's day is closed for the history, the present day is not.
CLOSED = Retention(hot=7, logs=None)
DAY = f"{START:%Y%m%d}"


def chunk(seq: int, life: Life, at: datetime, text: str) -> Message:
    """A log chunk as it is stored at a time."""
    fields = {"Helmr-At": at.isoformat(), "Helmr-Dispatch": "1", "Helmr-Offset": "0"}
    subject = subjects.log(life.scope, life.id, 1, "stdout")
    return Message(seq, subject, int(at.timestamp()) * 10**9, fields, text.encode())


@pytest.fixture
async def log(nc: Nats) -> Nats:
    """A connection to a server that has the streams."""
    await ensure_topology(nc)
    return nc


@pytest.fixture
async def old(log: Nats) -> list[Life]:
    """Runs of long ago, and one of today, in the log."""
    told = [*lives(8), Life(start=datetime.now(UTC)).queued().leased().succeeds({"today": True})]
    for life in told:
        await publish(log, life.published())
    return told


async def archived(projector: Projector, retention: Retention = CLOSED) -> None:
    """Archive what is to be archived now."""
    await projector.fresh(logs=True)
    await Archive(store_of(projector), projector.history, retention).once(datetime.now(UTC))


async def asked(nc: Nats, life: Life) -> list[dict[str, Any]]:
    """A run's events, as the history answers."""
    return list((await ask(nc, "events", {"run_id": life.id}))["events"])


async def test_archived_events_are_read_like_the_others(
    log: Nats, old: list[Life], tmp_path: Path, nats_url: str
) -> None:
    async with history(log, tmp_path / "h") as projector:
        await projector.fresh()
        before = [await asked(log, life) for life in old]
        sql = "SELECT seq, kind, code, data::JSON FROM events ORDER BY seq"
        rows = await table(log, sql)
        await archived(projector)
        with reading(store_of(projector)) as cursor:
            assert cursor.execute("SELECT count(*) FROM events").fetchone() == (len(old[-1].events),)
        assert [await asked(log, life) for life in old] == before
        assert await table(log, sql) == rows
        assert await table(log, "SELECT data.output FROM events WHERE kind = 'succeeded' ORDER BY seq DESC LIMIT 1")
    assert (await verify(nats_url, tmp_path / "h")).same


async def test_archived_logs_are_read_like_the_others(log: Nats, tmp_path: Path) -> None:
    life = Life().queued().leased().succeeds()
    await publish(log, life.published())
    store = Store(Home(tmp_path / "h"))
    chunks = [chunk(seq, life, START + timedelta(seconds=seq), f"line {seq}\n") for seq in range(1, 50)]
    store.logs.store(store.logs.prepare({topology.LOGS: chunks}))
    store.close()
    for _ in range(50):  # so that the log is not behind the history
        await publish_log(log, life.id, b"today\n")
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        assert store_of(projector).logs.days()[0] == DAY
        assert not Home(tmp_path / "h").day(DAY).exists()
        with reading(store_of(projector), DAY) as cursor:
            read = reads.chunks(life.id, attempt=1, stream="stdout", after=9, room=10**6, limit=100)
            assert [each.seq for each in read(cursor)] == list(range(10, 50))
        assert await table(log, "SELECT count(*), min(seq), max(text) FROM logs") == [[50, 1, "today\n"]]
        found = await ask(log, "search", {"pattern": "line 4", "since": "2026-01-01T00:00:00Z"})
        assert len(found["matches"]) == 11


async def test_what_is_written_does_not_stay_in_the_write_ahead_log(log: Nats, old: list[Life], tmp_path: Path) -> None:
    journal = tmp_path / "h" / "history.db.wal"
    async with history(log, tmp_path / "h") as projector:
        await projector.fresh()
        assert journal.stat().st_size > 0
        await archived(projector, Retention(hot=36500))
        assert not journal.exists()
        assert await table(log, "SELECT count(*) FROM runs") == [[len(old)]]


class Killed(BaseException):
    """Stands for the process that dies."""


STEPS = {
    "before the file is synced": (parquet, "sync"),
    "before the file has its name": (Path, "rename"),
    "before it is entered": (Archive, "_enter_events"),
    "before the former rows are committed": (archives, "transaction"),
}


@pytest.mark.parametrize("step", STEPS)
async def test_a_kill_at_any_step_neither_loses_nor_doubles_an_event(
    step: str, log: Nats, old: list[Life], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    async with history(log, tmp_path / "h") as projector:
        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], die)
            with pytest.raises(Killed):
                await archived(projector)
        assert await table(log, "SELECT count(*) FROM events") == [[sum(len(life.events) for life in old)]]
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        assert await table(log, "SELECT count(*) FROM events") == [[sum(len(life.events) for life in old)]]
        assert {path.suffix for path in store_of(projector).home.archive.iterdir()} == {".parquet"}
        assert (await verify(str(log.connected_url.geturl()), tmp_path / "h")).same  # type: ignore[union-attr]


async def test_a_day_of_logs_that_is_in_both_places_counts_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    life = Life()
    store = Store(home)
    try:
        chunks = [chunk(1, life, START, "a"), chunk(2, life, START + timedelta(days=1), "b")]
        store.logs.store(store.logs.prepare({topology.LOGS: chunks}))
        kept = home.day(DAY).read_bytes()
        lane = Projector(None, store).history  # type: ignore[arg-type]  # it is not run
        await Archive(store, lane, CLOSED).once(datetime.now(UTC))
        assert home.cold_days() == [DAY]
        home.day(DAY).write_bytes(kept)  # as if killed before the deletion
        assert store.logs.days() == [DAY, f"{START + timedelta(days=1):%Y%m%d}"]
        with reading(store, DAY) as cursor:
            assert cursor.execute("SELECT count(*) FROM logs").fetchone() == (1,)
    finally:
        store.close()
    assert compare(home, home).tables["logs"].rows == 2


async def test_what_has_been_kept_long_enough_is_deleted(log: Nats, old: list[Life], tmp_path: Path) -> None:
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        await archived(projector, Retention(hot=7, logs=30, events=30))
        assert await table(log, "SELECT DISTINCT run_id FROM events") == [[old[-1].id]]
        assert await table(log, "SELECT count(*) FROM runs") == [[len(old)]]
        assert not list(store_of(projector).home.archive.glob("events-*"))


OTHER = Scope("other", "dev")


def deployed(scope: Scope, retention: RetentionEntry) -> list[Published]:
    """A deployment that says what is kept, and that it is the current one."""
    made = Deployment(
        id=f"dep_{scope.project}",
        version="20260301.1",
        project=scope.project,
        environment=scope.environment,
        content_hash="c",
        archive="a",
        archive_bytes=1,
        created_at=START,
        index=msgspec.to_builtins(Index(retention=retention)),
    )
    key = f"{scope.project}.{scope.environment}"
    current = (f"$KV.config.current.{key}", made.id.encode())
    return [(f"$KV.config.deployment.{key}.{made.id}", msgspec.json.encode(made)), current]


async def days_of(nc: Nats, scope: Scope) -> list[int]:
    """How many days ago each event of a scope was, the newest first."""
    sql = "SELECT DISTINCT date_diff('day', at::DATE, now()::DATE) AS ago FROM events ORDER BY ago"
    return [ago for (ago,) in await table(nc, sql, scope=scope)]


async def test_each_project_says_how_long_it_is_kept(log: Nats, tmp_path: Path, nats_url: str) -> None:
    now = datetime.now(UTC)
    for ago in (40, 20, 10, 5, 0):
        for scope in (SCOPE, OTHER):
            life = Life(scope=scope, start=now - timedelta(days=ago)).queued().leased().succeeds()
            await publish(log, life.published())
    await publish(log, deployed(SCOPE, RetentionEntry(keep_events=3)))
    installation = Retention(hot=7, logs=30, events=30)
    async with history(log, tmp_path / "h") as projector:
        await archived(projector, installation)
        assert await days_of(log, SCOPE) == [0]
        assert await days_of(log, OTHER) == [0, 5, 10, 20]
        assert (await verify(nats_url, tmp_path / "h")).same
        files = set(store_of(projector).home.archive.iterdir())
        await archived(projector, installation)
        assert {(path, path.stat().st_mtime_ns) for path in files} == {
            (path, path.stat().st_mtime_ns) for path in store_of(projector).home.archive.iterdir()
        }
        await publish(log, deployed(OTHER, RetentionEntry(keep_events="forever")))
        await archived(projector, Retention(hot=7, events=8))
        assert await days_of(log, OTHER) == [0, 5, 10, 20]
        await publish(log, deployed(OTHER, RetentionEntry()))
        await archived(projector, Retention(hot=7, events=8))
        assert await days_of(log, OTHER) == [0, 5]
    found = await verify(nats_url, tmp_path / "h")
    assert found.same
    assert found.tables["events"].aged == 0


async def test_logs_of_each_project_are_kept_as_long_as_it_says(log: Nats, tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    mine, theirs = Life().queued().leased().succeeds(), Life(scope=OTHER).queued().leased().succeeds()
    now = datetime.now(UTC)
    store = Store(home)
    told = [(ago, life) for ago in (20, 10, 0) for life in (mine, theirs)]
    chunks = [chunk(seq, life, now - timedelta(days=ago), f"{ago}\n") for seq, (ago, life) in enumerate(told, 1)]
    store.logs.store(store.logs.prepare({topology.LOGS: chunks}))
    store.close()
    await publish(log, [*mine.published(), *theirs.published(), *deployed(SCOPE, RetentionEntry(keep_logs=15))])
    for _ in range(len(told)):
        await publish_log(log, mine.id, b"so that the log is not behind the history\n")
    async with history(log, home.root) as projector:
        await archived(projector)
        for scope, kept in ((SCOPE, ["10", "0"]), (OTHER, ["20", "10", "0"])):
            sql = "SELECT trim(text, chr(10)) FROM logs ORDER BY seq"
            assert [text for (text,) in await table(log, sql, scope=scope)][: len(kept)] == kept


DELETION_STEPS = {
    "before the file without them is synced": (parquet, "sync"),
    "before it takes the place of the other": (Path, "rename"),
    "before the file is removed": (Path, "unlink"),
}


@pytest.mark.parametrize("step", DELETION_STEPS)
async def test_a_kill_while_deleting_leaves_what_is_to_stay(
    step: str, log: Nats, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    now = datetime.now(UTC)
    for ago, scope in ((30, SCOPE), (20, SCOPE), (20, OTHER), (0, SCOPE)):
        await publish(log, Life(scope=scope, start=now - timedelta(days=ago)).queued().published())
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        await publish(log, deployed(SCOPE, RetentionEntry(keep_events=10)))
        with monkeypatch.context() as patch:
            patch.setattr(*DELETION_STEPS[step], die)
            with pytest.raises(Killed):
                await archived(projector)
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        assert await days_of(log, SCOPE) == [0]
        assert await days_of(log, OTHER) == [20]
        assert {path.suffix for path in store_of(projector).home.archive.iterdir()} == {".parquet"}
    assert (await verify(nats_url, tmp_path / "h")).same


@pytest.mark.timeout(600)  # three times thirty databases are made
async def test_thirty_archived_days_are_restored_into_an_empty_installation(
    log: Nats, tmp_path: Path, nats_url: str
) -> None:
    home, restored = Home(tmp_path / "h"), Home(tmp_path / "restored")
    now = datetime.now(UTC)
    store = Store(home)
    told: list[Life] = []
    for ago in range(32, -1, -1):
        told = lives(2, start=now - timedelta(days=ago))
        await publish(log, [message for life in told for message in life.published()])
        chunks = [chunk(2 * ago + at, told[0], now - timedelta(days=ago), f"{ago}\n" * 100) for at in (1, 2)]
        store.logs.store(
            store.logs.prepare({topology.LOGS: [each._replace(seq=66 - each.seq) for each in reversed(chunks)]})
        )
    store.close()
    for _ in range(70):
        await publish_log(log, told[0].id, b"today\n")
    async with history(log, home.root) as projector:
        await archived(projector)
        assert len(list(home.archive.glob("events-*"))) == 25
        assert len(home.cold_days()) == 25
        asked = (
            "SELECT count(*), bit_xor(hash(seq, kind, at, data::JSON::VARCHAR)) FROM events",
            "SELECT count(*), sum(hash(text)) FROM logs",
        )
        before = [await table(log, sql) for sql in asked]
        await export(home.root, tmp_path / "out.tar")
    assert (await import_(nats_url, restored.root, tmp_path / "out.tar"))[1] == 0
    assert compare(home, restored).same
    assert compare(restored, home).same
    found = await verify(nats_url, restored.root)
    # The chunks of long ago were never in the log of this test.
    assert not any(t.missing or t.extra for name, t in found.tables.items() if name != "logs")
    async with history(log, restored.root) as projector:
        await projector.fresh(logs=True)
        assert [await table(log, sql) for sql in asked] == before


async def test_anything_that_reads_parquet_reads_the_archive(log: Nats, old: list[Life], tmp_path: Path) -> None:
    async with history(log, tmp_path / "h") as projector:
        await archived(projector)
        (path,) = store_of(projector).home.archive.glob("events-*.parquet")
    found = pyarrow.parquet.read_table(path).to_pylist()
    expected = [event for life in old[:-1] for event in life.events]
    assert [row["id"] for row in found] == [event.id for event in expected]
    assert [msgspec.json.decode(row["data"]) for row in found] == [
        msgspec.json.decode(msgspec.json.encode(event.data)) for event in expected
    ]
    assert [row["at"] for row in found] == [event.at for event in expected]
    with duckdb.connect() as con:
        seqs = [seq for (seq,) in con.execute("SELECT seq FROM read_parquet(?)", [str(path)]).fetchall()]
    assert seqs == sorted(seqs)
