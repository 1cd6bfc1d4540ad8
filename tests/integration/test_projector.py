"""The projector in this process: what is in the log is in the tables, once, whatever happens in between."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import msgspec
import pytest
from nats.aio.client import Client as Nats
from nats.js.kv import KeyValue

from bus import topology, watermark
from bus.reader import Message, StreamReader
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from bus.watermark import Watermark
from helmr import subjects
from helmr.connection import connected
from helmr.errors import ConfigError, Conflict, HelmrError, TimedOut, Unavailable
from helmr.models import Deployment
from store import schema, sinks, tables
from store.home import Home
from store.projector import PUBLISHED_STREAMS
from store.sinks import Store
from store.verify import verify
from tests.integration.history import (
    history,
    last_sequence,
    projecting,
    publish,
    publish_log,
    query,
    reading,
    rows,
    store_of,
    table,
)
from tests.lives import SCOPE, START, Life, lives, messages, record, session, workspace

pytestmark = pytest.mark.anyio


@pytest.fixture
async def log(nc: Nats) -> Nats:
    """A connection to a server that has the streams."""
    await ensure_topology(nc)
    return nc


async def everything(nc: Nats, number: int = 8) -> list[Life]:
    """A log with messages of every kind."""
    told = lives(number)
    for life in told:
        await publish(nc, session(life) + workspace(life, live=True) + life.published())
        await publish(nc, [record(life.spec.session_id, 1, {"approved": True})])
        await publish_log(nc, life.id, b"hello\n")
    bucket: KeyValue = await nc.jetstream().key_value(topology.CONFIG_BUCKET)
    made = Deployment(
        id="dep_1",
        version="20260301.1",
        project=SCOPE.project,
        environment=SCOPE.environment,
        content_hash="abc",
        archive="def",
        archive_bytes=10,
        created_at=START,
        index={"tasks": []},
    )
    await bucket.put(f"deployment.{SCOPE}.dep_1", msgspec.json.encode(made))
    await bucket.put(f"current.{SCOPE}", b"dep_1")
    return told


async def test_every_message_becomes_a_row(log: Nats, tmp_path: Path) -> None:
    told = await everything(log)
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh(logs=True)
        assert {row["id"]: row["status"] for row in rows(projector, "SELECT id, status FROM runs")} == {
            life.id: life.record.status for life in told
        }
        (counts,) = rows(
            projector,
            """SELECT (SELECT count(*) FROM events) events, (SELECT count(*) FROM sessions) sessions,
            (SELECT count(*) FROM workspaces) workspaces, (SELECT count(*) FROM records) records,
            (SELECT count(*) FROM deployments WHERE current) deployments""",
        )
        expected = {"sessions": 8, "workspaces": 8, "records": 8, "deployments": 1}
        assert counts == {"events": sum(len(life.events) for life in told), **expected}
        with reading(store_of(projector), store_of(projector).logs.days()[-1]) as cursor:
            assert cursor.execute("SELECT count(*), min(text) FROM logs").fetchone() == (8, "hello\n")


async def test_how_far_it_is_can_be_read_from_the_bucket(log: Nats, tmp_path: Path) -> None:
    assert await watermark.read(log) is None
    await everything(log)
    ends = {stream: await last_sequence(log, stream) for stream in PUBLISHED_STREAMS}
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh(logs=True)
        found = await told(log, ends)
    assert found.covers(topology.RUNS, ends[topology.RUNS])
    assert not found.covers(topology.RUNS, ends[topology.RUNS] + 1)
    assert not found.covers("OTHER", 1)
    # A projector that has nothing to apply tells it at once: a bucket may have been lost.
    bucket = await log.jetstream().key_value(topology.CONFIG_BUCKET)
    await bucket.delete(topology.WATERMARK_KEY)
    async with projecting(log, tmp_path / "h"):
        await told(log, ends)


async def told(nc: Nats, streams: dict[str, int]) -> Watermark:
    """The published watermark, once it says so."""
    async with asyncio.timeout(10):
        while True:
            found = await watermark.read(nc)
            if found is not None and found.streams == streams:
                return found
            await asyncio.sleep(0.05)


async def test_it_can_be_stopped_at_any_moment(log: Nats, tmp_path: Path) -> None:
    for number in range(12):
        async with asyncio.timeout(10), projecting(log, tmp_path / "h"):
            await asyncio.sleep(number / 1000)


async def test_open_attempts_and_waits_are_in_the_views(log: Nats, tmp_path: Path) -> None:
    life = Life().queued().leased().retries().add("waiting", {"kind": "token", "token": "tok_1"})
    await publish(log, life.published())
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh()
        attempts = rows(projector, "SELECT attempt, worker, outcome, finished_at FROM attempts ORDER BY attempt")
        assert [(row["attempt"], row["worker"], row["outcome"]) for row in attempts] == [
            (1, "wrk_1", "failed"),
            (2, "wrk_2", None),
        ]
        (wait,) = rows(projector, "SELECT kind, token, outcome, ended_at FROM waits")
        assert wait == {"kind": "token", "token": "tok_1", "outcome": None, "ended_at": None}


async def test_a_restart_goes_on_where_it_stopped(log: Nats, tmp_path: Path) -> None:
    life = Life().queued().leased().waits().succeeds({"ok": True})
    published = life.published()
    for start in range(0, len(published), 3):
        await publish(log, published[start : start + 3])
        async with projecting(log, tmp_path / "h") as projector:
            await projector.fresh()
    async with projecting(log, tmp_path / "h") as projector:
        (run,) = rows(projector, "SELECT status, waits, wait_seconds, payload, tags, cursor, first_seq FROM runs")
        assert run["payload"] == msgspec.json.encode(life.spec.payload).decode()
        assert (run["status"], run["waits"], run["wait_seconds"], run["first_seq"]) == ("succeeded", 1, 30.0, 1)
        assert rows(projector, "SELECT count(*) n FROM events") == [{"n": len(published)}]
        assert rows(projector, "SELECT count(*) n FROM runs_live") == [{"n": 0}]


async def test_messages_delivered_twice_are_applied_once(tmp_path: Path) -> None:
    published = messages([message for life in lives(8) for message in life.published()])
    store = Store(Home(tmp_path / "h"))
    try:
        for start in (0, 0, 3, 10, 0):
            store.history.store(store.history.prepare({topology.RUNS: published[start:]}))
        with reading(store) as cursor:
            counts = cursor.execute("SELECT count(*), count(DISTINCT seq) FROM events").fetchone()
        assert counts == (len(published), len(published))
    finally:
        store.close()


async def test_unreadable_messages_are_noted_and_passed_over(
    log: Nats, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await log.request(subjects.event(SCOPE, "run", "run_1", "started"), b"{nonsense", timeout=5)
    await publish(log, Life().queued().published())
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh()
        assert rows(projector, "SELECT stream, seq FROM unreadable") == [{"stream": "RUNS", "seq": 1}]
        assert rows(projector, "SELECT count(*) n FROM runs") == [{"n": 1}]
    assert "cannot be understood" in caplog.text


async def test_it_goes_on_when_the_server_comes_back(log: Nats, nats_server: EmbeddedServer, tmp_path: Path) -> None:
    async with projecting(log, tmp_path / "h") as projector:
        await publish(log, Life().queued().published())
        await projector.fresh()
        await nats_server.stop()
        await nats_server.start()
        async with connected(nats_server.url, name="test") as nc:
            await publish(nc, Life().queued().leased().published())
        await projector.fresh(timeout=20)
        assert rows(projector, "SELECT count(*) n FROM events") == [{"n": 4}]


async def test_it_goes_on_when_its_consumer_vanishes(log: Nats, tmp_path: Path) -> None:
    async with projecting(log, tmp_path / "h") as projector:
        await publish(log, Life().queued().published())
        await projector.fresh()
        js = log.jetstream()
        for consumer in await js.consumers_info(topology.RUNS):
            await js.delete_consumer(topology.RUNS, consumer.name)
        await publish(log, Life().queued().published())
        await projector.fresh(timeout=20)
        assert rows(projector, "SELECT count(*) n FROM runs") == [{"n": 2}]


async def test_deleted_messages_do_not_hold_up_freshness(log: Nats, tmp_path: Path) -> None:
    await publish(log, Life().queued().leased().published())
    await log.jetstream().delete_msg(topology.RUNS, await last_sequence(log))
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh()
        assert rows(projector, "SELECT count(*) n FROM events") == [{"n": 2}]


async def test_freshness_has_a_deadline(log: Nats, tmp_path: Path) -> None:
    async with projecting(log, tmp_path / "h") as projector:
        async with projector.history.commit:
            await publish(log, Life().queued().published())
            with pytest.raises(TimedOut, match="not caught up"):
                await projector.fresh(timeout=0.3)
        await projector.fresh()


async def test_a_log_that_went_back_is_refused(log: Nats, tmp_path: Path) -> None:
    await publish(log, Life().queued().leased().published())
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh()
    await log.jetstream().delete_stream(topology.RUNS)
    await ensure_topology(log)
    with pytest.raises(ConfigError, match="ends at #0, but the history has applied #3") as raised:
        async with projecting(log, tmp_path / "h"):
            pass
    assert "move history.db" in str(raised.value.hint)
    await publish(log, Life().queued().leased().waits().published())
    with pytest.raises(ConfigError, match="was made at"):
        async with projecting(log, tmp_path / "h"):
            pass


async def test_a_second_projector_is_refused(log: Nats, tmp_path: Path) -> None:
    async with projecting(log, tmp_path / "h"):
        with pytest.raises(Conflict, match="another process"):
            Store(Home(tmp_path / "h"))


def damage(path: Path, *, at: float = 0.5) -> None:
    """Flip some bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = int(len(data) * at)
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    path.write_bytes(bytes(data))


async def crash_copy(projector_home: Path, home: Path) -> None:
    """What a killed projector leaves: the files, with a write-ahead log that was never folded in."""
    home.mkdir()
    copying = await asyncio.create_subprocess_exec("cp", "-r", f"{projector_home}/.", str(home))
    assert await copying.wait() == 0


@pytest.mark.parametrize("broken", ["history.db.wal", "history.db", "logs"])
async def test_damaged_files_are_moved_aside_and_filled_from_the_log(
    log: Nats, nats_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    await everything(log)
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh(logs=True)
        await crash_copy(tmp_path / "h", tmp_path / "crashed")
    home = Home(tmp_path / "crashed")
    path = home.day(home.days()[-1]) if broken == "logs" else home.root / broken
    damage(path, at=0.0 if path.suffix == ".db" else 0.5)
    async with projecting(log, home.root) as projector:
        await projector.fresh(logs=True)
    assert "HISTORY DAMAGED" in caplog.text
    assert list(path.parent.glob("*.damaged-*"))
    assert (await verify(nats_url, home.root)).same


async def test_damage_found_while_writing_is_looked_for_at_the_next_start(
    log: Nats, nats_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await everything(log, 64)
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh(logs=True)
    home = Home(tmp_path / "h")
    damage(home.history, at=0.6)
    home.suspect.touch()
    async with projecting(log, home.root) as projector:
        await projector.fresh(logs=True)
    assert "HISTORY DAMAGED" in caplog.text
    assert not home.suspect.exists()
    assert (await verify(nats_url, home.root)).same


async def test_a_comparison_with_a_log_that_does_not_answer_says_so(
    log: Nats, nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with projecting(log, tmp_path / "h"):
        pass

    async def silent(_reader: StreamReader) -> int:
        raise Unavailable("JetStream does not answer")

    monkeypatch.setattr(StreamReader, "last", silent)
    with pytest.raises(Unavailable, match="does not answer"):
        await verify(nats_url, tmp_path / "h")


@pytest.mark.parametrize(
    ("made", "reason"),
    [("CREATE TABLE t(i INT)", "not one of Helmr's"), ("UPDATE schema_version SET version = 99", "later Helmr|knows")],
)
async def test_files_of_others_are_left_alone(tmp_path: Path, made: str, reason: str) -> None:
    home = Home(tmp_path / "h")
    if "UPDATE" in made:
        Store(home).close()
    home.make()
    with duckdb.connect(str(home.history)) as con:
        con.execute(made)
    with pytest.raises(ConfigError, match=reason):
        Store(home)
    assert not list(home.root.glob("*.damaged-*"))


async def test_a_file_of_an_earlier_schema_is_carried_over(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    told = [
        message for life in lives(8) for message in [*session(life), *workspace(life, live=True), *life.published()]
    ]
    log = messages(told)
    store = Store(home)
    store.history.store(store.history.prepare({topology.RUNS: log[:-3]}))
    store.close()
    with duckdb.connect(str(home.history)) as con:
        con.execute("UPDATE schema_version SET version = 0")
        con.execute("DROP TABLE tokens")
        for name in ("runs_closed", "runs_live"):
            con.execute(f"ALTER TABLE {name} DROP COLUMN exit_code")
        workspaces = con.execute("SELECT id, tags, metadata, last_seq FROM workspaces ORDER BY ALL").fetchall()
        for name in ("tags", "metadata"):
            con.execute(f"ALTER TABLE workspaces DROP COLUMN {name}")
        con.execute("ALTER TABLE sessions_live ADD COLUMN gone INTEGER")
        before = con.execute("SELECT seq, id, kind FROM events ORDER BY ALL").fetchall()
        open_runs = con.execute("SELECT id, open_attempt, waits FROM runs_live ORDER BY ALL").fetchall()
    store = Store(home)
    try:
        with reading(store) as cursor:
            assert cursor.execute("SELECT seq, id, kind FROM events ORDER BY ALL").fetchall() == before
            assert cursor.execute("SELECT id, open_attempt, waits FROM runs_live ORDER BY ALL").fetchall() == open_runs
            assert cursor.execute("SELECT count(exit_code) FROM runs_closed").fetchone() == (0,)
            assert cursor.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
            assert (
                cursor.execute("SELECT id, tags, metadata, last_seq FROM workspaces ORDER BY ALL").fetchall()
                == workspaces
            )
            assert cursor.execute("SELECT version FROM schema_version").fetchall() == [(tables.VERSION,)]
        assert store.history.applied[topology.RUNS] == log[-4].seq
        store.history.store(store.history.prepare({topology.RUNS: log}))
        with reading(store) as cursor:
            assert cursor.execute("SELECT count(*) FROM runs").fetchone() == (8,)
    finally:
        store.close()
    (kept,) = home.root.glob("history.db.former-*")
    assert {path.name for path in home.root.glob("history.db*")} == {"history.db", kept.name}


@pytest.mark.parametrize(("few", "checkpoints"), [(1000, True), (1, False)])
def test_a_history_that_keeps_up_is_checkpointed_early(
    few: int, checkpoints: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "EARLY", 1)
    monkeypatch.setattr(sinks, "FEW", few)
    home = Home(tmp_path / "h")
    store = Store(home)
    try:
        store.history.store(store.history.prepare({topology.RUNS: messages(lives(1)[0].published())}))
        assert home.history.with_name("history.db.wal").exists() is not checkpoints
    finally:
        store.close()


def test_a_checkpoint_that_somebody_is_in_the_way_of_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "EARLY", 1)
    home = Home(tmp_path / "h")
    store = Store(home)
    journal = home.history.with_name("history.db.wal")
    first, second = (life.published() for life in lives(2))
    try:
        with store.cursor() as cursor:
            store.use(cursor)
            cursor.execute("INSERT INTO forgotten VALUES ('a', 'dev', 'events', now())")
            cursor.execute("BEGIN")
            cursor.execute("UPDATE forgotten SET before = now()")
            store.history.store(store.history.prepare({topology.RUNS: messages(first)}))
            assert journal.exists()
        store.history.store(store.history.prepare({topology.RUNS: messages(second, first=len(first) + 1)}))
        assert not journal.exists()
    finally:
        store.close()


@pytest.mark.parametrize("step", ["made", "moved"])
async def test_a_kill_while_a_file_is_carried_over_loses_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "h")
    store = Store(home)
    store.history.store(store.history.prepare({topology.RUNS: messages(lives(1)[0].published())}))
    store.close()
    with duckdb.connect(str(home.history)) as con:
        con.execute("UPDATE schema_version SET version = 0")
    whole = home.history.with_name("history.db.whole")

    class Killed(BaseException):
        """Stands for the process that dies."""

    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if (step == "made" and target == whole) or path == whole:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        with pytest.raises(Killed):
            Store(home)
    store = Store(home)
    try:
        with reading(store) as cursor:
            assert cursor.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    finally:
        store.close()
    assert {path.suffix for path in home.root.glob("history.db*")} - {".db"} == {
        next(home.root.glob("*.former-*")).suffix
    }


def chunk(seq: int, day: int, hour: int = 0) -> Message:
    """A log chunk stored on a day of March 2026."""
    stored = int(datetime(2026, 3, day, hour, tzinfo=UTC).timestamp()) * 10**9
    return Message(seq, subjects.log(SCOPE, "run_1", 1, "stdout"), stored, {"Helmr-At": START.isoformat()}, b"x")


async def test_logs_go_into_a_file_per_day(tmp_path: Path) -> None:
    home = Home(tmp_path / "h")
    store = Store(home)
    try:
        chunks = [chunk(1, 1), chunk(2, 1, 23), chunk(3, 2), chunk(4, 1, 23), chunk(5, 4)]
        store.logs.store(store.logs.prepare({topology.LOGS: chunks}))
        found = {}
        for day in store.logs.days():
            with reading(store, day) as cursor:
                found[day] = [seq for (seq,) in cursor.execute("SELECT seq FROM logs ORDER BY seq").fetchall()]
        # The fourth was stored after a clock went back: a finished day stays finished.
        assert found == {"20260301": [1, 2], "20260302": [3, 4], "20260304": [5]}
        assert not list(home.logs.glob("logs-2026030[12].db.wal"))
    finally:
        store.close()
    again = Store(home)
    assert (again.logs.applied, again.logs.day) == ({topology.LOGS: 5}, "20260304")
    again.close()


async def test_times_in_the_log_file_are_those_of_the_writer_and_of_the_log(log: Nats, tmp_path: Path) -> None:
    before = datetime.now(UTC)
    await publish_log(log, "run_1", b"\xff\xfe")
    async with projecting(log, tmp_path / "h") as projector:
        await projector.fresh(logs=True)
        with reading(store_of(projector), store_of(projector).logs.days()[-1]) as cursor:
            (row,) = cursor.sql('SELECT "at", stored_at, raw, bytes FROM logs').to_arrow_table().to_pylist()
    assert row["at"] == START
    assert before <= row["stored_at"] <= datetime.now(UTC)
    assert (row["raw"], row["bytes"]) == (b"\xff\xfe", 2)


async def test_the_schema_explains_itself(tmp_path: Path) -> None:
    store = Store(Home(tmp_path / "h"))
    try:
        with reading(store) as cursor:
            silent = cursor.execute(
                "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = 'h' AND comment IS NULL"
            ).fetchall()
        computed = {"queue_seconds", "duration_seconds", "activity", "current", "version"}
        questions = set(schema.QUESTIONS)
        assert [
            (t, c) for t, c in silent if c not in computed and t not in questions and not c.startswith("open_")
        ] == []
    finally:
        store.close()


async def test_nothing_stays_behind(log: Nats, tmp_path: Path) -> None:
    await publish(log, Life().queued().published())
    home = Home(tmp_path / "h")
    async with history(log, home.root):
        assert await table(log, "select count(*) from runs") == [[1]]
        running = asyncio.create_task(query(log, "select count(*) from range(1000000000000)", timeout=30))
        await asyncio.sleep(0.3)
    with pytest.raises(HelmrError):
        await running
    assert not list(home.snapshots.rglob("*.db"))
    assert not list(home.scratch.iterdir())
