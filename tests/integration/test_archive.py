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
from store import archive as archives
from store import reads
from store.archive import Archive, Retention
from store.home import Home
from store.projector import Projector
from store.sinks import Store
from store.verify import compare, verify
from tests.integration.history import ask, history, publish, publish_log, reading, store_of, table
from tests.lives import SCOPE, START, Life, lives

pytestmark = pytest.mark.anyio

#: All of START's day is closed for the history, the present day is not.
CLOSED = Retention(hot=7, logs=None)
DAY = f"{START:%Y%m%d}"


def chunk(seq: int, life: Life, at: datetime, text: str) -> Message:
    """A log chunk as it is stored at a time."""
    fields = {"Helmr-At": at.isoformat(), "Helmr-Dispatch": "1", "Helmr-Offset": "0"}
    subject = subjects.log(SCOPE, life.id, 1, "stdout")
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
    "before the file is synced": (archives, "_sync"),
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
