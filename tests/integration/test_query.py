"""Users' SQL: right answers, fresh, within one's own scope; whatever else it tries is bounded in time, memory and reach."""

from __future__ import annotations

# ruff: noqa: S608  # the names of tables are our own
import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.ipc as arrow_ipc
import pytest
from nats.aio.client import Client as Nats

from bus.setup import ensure_topology
from helmr.errors import HelmrError, TimedOut, UsageError
from helmr.subjects import Scope
from store import confinement, exposure, parquet, question, sandboxes, schema
from store.archive import Archive
from store.exposure import Source
from store.projector import Projector
from store.question import Summary
from store.retention import Retention
from store.sandbox import Task
from store.sandboxes import Child
from tests.hostile import AT_THE_ARCHIVE, BOMBS, MISDIRECTED, REFUSED
from tests.integration.history import ask, history, publish, publish_log, query, reading, store_of, table
from tests.lives import SCOPE, Life, access, lives, record, session, token, workspace

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("projector")]

OTHER = Scope("other", "dev")


@pytest.fixture
async def projector(nc: Nats, tmp_path: Path) -> AsyncIterator[Projector]:
    """A running history over a log of eight runs of one project, and one of another."""
    await ensure_topology(nc)
    for life in (*lives(8), Life(scope=OTHER, task_id="theirs").queued().leased().fails(message="secret")):
        await publish(nc, life.published() + session(life) + workspace(life))
        await publish(nc, [record(life.spec.session_id, 1, {"n": 1}, scope=life.scope)])
        await publish_log(nc, life.id, b"said\n" * 3, scope=life.scope)
    for scope in (SCOPE, OTHER):
        await publish(nc, token(scope=scope) + access(scope=scope))
    async with history(nc, tmp_path / "h") as projector:
        yield projector


async def test_questions_are_answered(nc: Nats) -> None:
    assert sorted(await table(nc, "select status, count(*) from runs group by all")) == [
        ["cancelled", 1],
        ["failed", 2],
        ["queued", 1],
        ["running", 1],
        ["succeeded", 2],
        ["waiting", 1],
    ]
    assert await table(nc, "select payload->>'pr', payload.nested.a[0]::int from runs limit 1") == [["42", 1]]
    assert await table(nc, "select data.name::varchar from events where kind = 'step'") == [["fetch"]]
    assert await table(nc, "select at, kind from events order by at, cursor limit 1") == [
        ["2026-03-01T12:00:01.123456Z", "queued"]
    ]
    assert await table(nc, "select code, message, count(*) from failures group by all order by 1") == [
        ["out_of_memory", "it broke", 1],
        ["task_error", "it broke", 1],
    ]
    assert await table(nc, "select sum(runs), sum(retries) from task_health") == [[8, 1]]


async def test_every_table_can_be_read_in_both_formats(nc: Nats) -> None:
    for name in sorted(schema.VISIBLE):
        body, fields = await query(nc, f"select * from {name}")
        found = arrow_ipc.open_stream(body).read_all()
        assert found.num_rows == int(fields["Helmr-Rows"]) == len(await table(nc, f"select * from {name}"))
        assert (await table(nc, f"describe {name}"))[0][0] == found.column_names[0]
        assert (found.num_rows > 0) == (name not in {"schedules", "versions", "deployments"})


async def test_json_says_names_and_types_and_passes_json_through(nc: Nats) -> None:
    numbers = "1::hugeint big, 1.5::decimal(4,2) d, 'nan'::double n"
    sql = f"select {numbers}, [1] l, {{'a': date '2026-01-01'}} s, '{{\"b\": [1]}}'::json j"
    body, _ = await query(nc, sql, format="json")
    head, row = map(json.loads, body.splitlines())
    assert [(column["name"], column["type"]) for column in head["columns"]] == [
        ("big", "HUGEINT"),
        ("d", "DECIMAL(4,2)"),
        ("n", "DOUBLE"),
        ("l", "INTEGER[]"),
        ("s", "STRUCT(a DATE)"),
        ("j", "JSON"),
    ]
    assert row == [1, "1.50", "nan", [1], {"a": "2026-01-01"}, {"b": [1]}]


async def test_arrow_says_what_is_json(nc: Nats) -> None:
    body, _ = await query(nc, "select data, data d2, id from events limit 1")
    told = arrow_ipc.open_stream(body).schema
    assert [field.metadata[b"duckdb_type"] for field in told] == [b"JSON", b"JSON", b"VARCHAR"]
    assert told.field("data").type == pa.lib.string()


async def test_one_project_sees_nothing_of_another(nc: Nats) -> None:
    for name in sorted(schema.VISIBLE - {"deployments", "schedules", "versions"}):
        (row,) = await table(nc, f"select count(*), count(*) filter (project <> 'acme') from {name}")
        assert row[0] > 0
        assert row[1] == 0
    assert await table(nc, "select task_id, status from runs", scope=OTHER) == [["theirs", "failed"]]
    assert await table(nc, "select count(*) from logs", scope=OTHER) == [[1]]
    assert await table(nc, "select count(*) from runs", scope=Scope("acme", "prod")) == [[0]]
    assert await table(nc, "select count(*) from runs", scope=Scope("x'or'1'='1", "dev")) == [[0]]


async def test_a_query_sees_what_was_stored_before_it(nc: Nats) -> None:
    for number in range(5):
        life = Life(task_id="fresh").queued()
        await publish(nc, life.published())
        await publish_log(nc, life.id, b"now")
        sql = "select count(*), count(text) from runs left join logs on run_id = id where task_id = 'fresh'"
        assert await table(nc, sql) == [[number + 1, number + 1]]


async def test_logs_of_all_days_are_one_table(nc: Nats, projector: Projector, monkeypatch: pytest.MonkeyPatch) -> None:
    await projector.fresh(logs=True)
    monkeypatch.setattr("store.steps.day_of", lambda _message: "29991231")
    await publish_log(nc, "run_later", b"tomorrow")
    assert await table(nc, "select count(*), count(distinct run_id) from logs") == [[9, 9]]
    assert len(store_of(projector).logs.days()) == 2
    assert await table(nc, "select text from logs where run_id = 'run_later'") == [["tomorrow"]]
    await projector.fresh(logs=True)
    with reading(store_of(projector), store_of(projector).logs.days()[0]) as cursor:
        assert cursor.execute("SELECT count(*) FROM logs").fetchone() == (9,)


async def test_large_results_come_in_parts(nc: Nats) -> None:
    body, fields = await query(nc, "select range as i, md5(range::varchar) m from range(100000)", limit=100_000)
    found = arrow_ipc.open_stream(body).read_all()
    assert found.num_rows == int(fields["Helmr-Rows"]) == 100_000
    assert found.column("i").to_pylist() == list(range(100_000))
    assert int(fields["Helmr-End"]) > 5


async def test_rows_are_capped(nc: Nats) -> None:
    for limit, rows in ((None, question.ROWS), (0, 0), (1, 1), (5000, 5000)):
        body, fields = await query(nc, "from range(20000)", limit=limit)
        assert arrow_ipc.open_stream(body).read_all().num_rows == rows
        assert fields["Helmr-Truncated"] == "rows"
    assert "Helmr-Truncated" not in (await query(nc, "from range(10)", limit=10))[1]


async def test_bytes_are_capped(nc: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxes, "MAX_BYTES", 1024**2)
    body, fields = await query(nc, "select md5(range::varchar) from range(1000000)", limit=1_000_000)
    assert fields["Helmr-Truncated"] == "bytes"
    assert len(body) < 2 * 1024**2


async def test_errors_show_the_place(nc: Nats) -> None:
    for sql, message, detail in (
        ("select nope from runs", "Referenced column", "LINE 1: select nope from runs"),
        ("select id\nfrom runs\nwhere where", "syntax error", "where where\n      ^"),
        ("select abss(1)", "function abss is not possible", ""),
        ("select id::int from runs", "Could not convert string", "LINE 1: select id::int"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            await query(nc, sql)
        assert detail in raised.value.details.get("excerpt", "")
    with pytest.raises(UsageError) as raised:
        await query(nc, "select data->>'name' from events")
    assert "data.name" in str(raised.value.hint)


def stored(projector: Projector) -> set[str]:
    """The files of a history; copies for queries are left out, which are renewed when the history has grown."""
    home = store_of(projector).home
    return {str(path) for path in home.root.rglob("*") if path.is_file() and home.snapshots not in path.parents}


#: How much there is of everything, and what it says.
EVERYTHING = """
    select (select count(*) from runs), (select bit_xor(hash(e)) from events e),
        (select bit_xor(hash(l)) from logs l), (select count(*) from sessions)
"""


async def test_hostile_statements_are_refused_and_leave_no_trace(
    nc: Nats, projector: Projector, tmp_path: Path
) -> None:
    await table(nc, "select count(*) from logs, runs")
    before, outside = stored(projector), set(Path("/tmp").iterdir())
    rows = await table(nc, EVERYTHING)
    for sql in REFUSED + MISDIRECTED:
        with pytest.raises(HelmrError):
            await query(nc, sql, timeout=5)
    assert stored(projector) == before
    assert await table(nc, EVERYTHING) == rows
    assert {path for path in set(Path("/tmp").iterdir()) - outside if path.name in {"f", "x", "x.db"}} == set()
    assert tmp_path.exists()


#: Bombs of one test, and the seconds each gets.
_AT_A_TIME, _DEADLINE = 8, 0.5
#: Seconds after which something hangs, however loaded the machine.
_PATIENCE = 60


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(BOMBS), _AT_A_TIME))
async def test_attacks_on_time_and_memory_are_stopped_and_disturb_nobody(
    nc: Nats, projector: Projector, first: int
) -> None:
    """Two at a time, while runs go on happening and others ask about them."""

    async def attack(sql: str) -> None:
        async with asyncio.timeout(_PATIENCE):
            with pytest.raises(HelmrError):
                await query(nc, sql, timeout=_DEADLINE)

    async def attackers() -> None:
        while bombs:
            await attack(bombs.pop())

    await table(nc, "select 1 from runs")
    before = stored(projector)
    bombs = BOMBS[first : first + _AT_A_TIME]
    attacking = asyncio.gather(*(attackers() for _ in range(sandboxes.CONCURRENT)))
    added = 0
    while not attacking.done():
        await publish(nc, Life(task_id="meanwhile").queued().leased().succeeds().published())
        added += 1
        page = await ask(nc, "runs", {"fresh": True, "task": "meanwhile", "limit": 1000})
        assert len(page["runs"]) == added
    await attacking
    assert await table(nc, "select count(*) from runs") == [[8 + added]]
    assert stored(projector) == before


BEYOND = [
    "insert into runs select * from runs",
    "create table memory.main.t as select 1; copy (select 1) to '{tmp}/out.csv'",
    "copy (select 1) to '{tmp}/out.csv'",
    "with x as (copy (select 1) to '{tmp}/out.csv') select 1",
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/proc/self/environ')",
    "attach '{tmp}/other.db'",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "set memory_limit = '100GB'",
    "set temp_directory = '{tmp}'",
    "install httpfs",
    "load '{tmp}/x.duckdb_extension'",
    "export database '{tmp}/export'",
]


async def test_what_the_guard_would_miss_is_refused_by_the_engine(
    nc: Nats, projector: Projector, tmp_path: Path
) -> None:
    await table(nc, "select 1 from runs")
    (copy,) = store_of(projector).home.snapshots.rglob("history.db")
    source = Source(project="acme", environment="dev", history=str(copy))
    for sql in BEYOND:
        with exposure.connection(source) as con, pytest.raises(duckdb.Error):
            con.execute(sql.format(tmp=tmp_path))
    with exposure.connection(source) as con:
        hidden = con.execute("SELECT database_name FROM duckdb_databases() WHERE readonly").fetchone()
        assert hidden is not None
        for sql in (
            "DELETE FROM {}.events",
            "INSERT INTO {}.projection VALUES ('x', 1, now(), '')",
            "DROP TABLE {}.events",
        ):
            with pytest.raises(duckdb.Error):
                con.execute(sql.format(hidden[0]))
    assert not list(tmp_path.glob("o*")) + list(tmp_path.glob("e*"))


async def test_what_gets_past_guard_and_engine_finds_the_archive_protected(nc: Nats, projector: Projector) -> None:
    store = store_of(projector)
    await table(nc, "select 1 from runs")
    await Archive(store, projector.history, Retention(hot=7)).once(datetime.now(UTC))
    rows = await table(nc, EVERYTHING)
    (copy,) = store.home.snapshots.rglob("history.db")
    (file,) = store.home.archive.iterdir()
    before = file.read_bytes(), sorted(store.home.archive.iterdir())
    child = await Child.start()
    try:
        for sql in AT_THE_ARCHIVE:
            task = Task(
                verb="run",  # without having been checked
                sql=sql.format(file=file, folder=file.parent),
                source=Source(project="acme", environment="dev", history=str(copy), archive=str(file.parent)),
                max_rows=10,
                max_bytes=10_000,
                seconds=10,
            )
            with contextlib.suppress(HelmrError):  # attaching it, to look, is no harm
                await child.ask(task, _nowhere)
            assert (file.read_bytes(), sorted(file.parent.iterdir())) == before, sql
    finally:
        await child.kill()
    assert await table(nc, EVERYTHING) == rows


#: What would change what the next query of the same project reads, were it not for the transaction it runs in.
LEFT_BEHIND = [
    "create or replace view runs as select 1 as id",
    "create temp view runs as select 1 as id",
    "create table t as select 1",
    "create macro date_trunc(a, b) as 1",
    "drop view runs",
    "prepare p as select 1",
    "use temp",
    "commit",
]


async def test_a_query_leaves_nothing_behind_for_the_next(nc: Nats, projector: Projector) -> None:
    await table(nc, "select 1 from runs")
    (copy,) = store_of(projector).home.snapshots.rglob("history.db")
    source = Source(project="acme", environment="dev", history=str(copy))
    child = await Child.start()

    async def asked(sql: str) -> Summary:
        task = Task(verb="run", sql=sql, source=source, max_rows=10, max_bytes=10_000, seconds=_PATIENCE)
        return msgspec.json.decode(await child.ask(task, _nowhere), type=Summary)

    try:
        for sql in LEFT_BEHIND:  # without having been checked
            with contextlib.suppress(HelmrError):
                await asked(sql)
            assert (await asked("select id from runs order by date_trunc('hour', created_at)")).rows == 8, sql
    finally:
        await child.kill()


async def _nowhere(_part: bytes) -> None:
    """Nobody wants the rows."""


#: Each wall alone, in a process of its own: what it keeps a process from.
WALLS = {
    "landlock": """
        if not confinement.forbid_writing(libc):
            sys.exit(77)
        refused(lambda: open(protected, "r+"))
        refused(lambda: open(plain, "w"))
        refused(lambda: os.unlink(plain))
        refused(lambda: os.rename(plain, plain + "2"))
        refused(lambda: os.mkdir(plain + "3"))
        refused(lambda: os.truncate(plain, 0))
        refused(lambda: os.execv("/bin/true", ["true"]))
        assert open(plain).read() == "kept"
        """,
    "permissions": """
        confinement.drop_capabilities(libc)
        refused(lambda: open(protected, "r+"))
        refused(lambda: open(protected, "w"))
        assert open(protected).read() == "kept"
        """,
}
_WALL = """
import ctypes, os, sys
from store import confinement

protected, plain = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)


def refused(attempt):
    try:
        attempt()
    except PermissionError:
        return
    raise SystemExit("it was not refused")
"""


@pytest.mark.parametrize("wall", WALLS)
async def test_each_wall_holds_alone(wall: str, tmp_path: Path) -> None:
    protected, plain = tmp_path / "protected", tmp_path / "plain"
    for path in (protected, plain):
        path.write_text("kept")
    parquet.protect(protected)
    code = _WALL + textwrap.dedent(WALLS[wall])
    command = [sys.executable, "-c", code, str(protected), str(plain)]
    done = await asyncio.to_thread(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    if done.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert (done.returncode, done.stderr) == (0, "")
    assert (protected.read_text(), plain.read_text()) == ("kept", "kept")


async def test_the_child_has_limits_and_no_environment(nc: Nats) -> None:
    await table(nc, "select 1")
    mine = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    children = [path for pid in mine if b"store.sandbox" in ((path := Path("/proc") / pid) / "cmdline").read_bytes()]
    assert children
    for path in children:
        limits = (path / "limits").read_text()
        assert "Max file size             0" in limits
        assert f"Max address space         {confinement.ADDRESS_SPACE}" in limits
        assert (path / "environ").read_bytes() in {b"", b"LC_CTYPE=C.UTF-8\0"}


async def test_queries_wait_for_one_another_and_give_up_in_time(nc: Nats) -> None:
    await table(nc, "select 1")
    slow = "select count(*) from range(1000000000000)"
    answers = await asyncio.gather(
        *(query(nc, slow, timeout=1.5) for _ in range(2)),
        query(nc, "select 1", timeout=0.5),
        query(nc, "select 1", timeout=_PATIENCE),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers[:3]] == [TimedOut, TimedOut, TimedOut]
    assert "other queries" in str(answers[2])
    assert isinstance(answers[3], tuple)


async def test_other_questions_are_answered_meanwhile(nc: Nats, projector: Projector) -> None:
    slow = asyncio.create_task(query(nc, "select count(*) from range(1000000000000)", timeout=_PATIENCE))
    async with asyncio.timeout(_PATIENCE):
        while not list(store_of(projector).home.snapshots.rglob("history.db")):  # noqa: ASYNC110  # nobody says that it runs
            await asyncio.sleep(0.01)
        await ask(nc, "runs", {"fresh": True})
    assert not slow.done()
    slow.cancel()


async def test_a_slow_query_is_told_how_long_it_took(nc: Nats) -> None:
    with pytest.raises(TimedOut, match=r"longer than 0\.5 s"):
        await query(nc, "select count(*) from range(1000000000000)", timeout=0.5)


async def test_an_error_made_of_rows_is_cut_off(nc: Nats) -> None:
    sql = "select error(x) from (select string_agg(md5(range::varchar)) x from range(100000))"
    with pytest.raises(UsageError) as raised:
        await query(nc, sql)
    assert 100 < len(raised.value.message) < 5000


async def test_parameters_are_bound_never_pasted(nc: Nats) -> None:
    hostile = "x' or 1 = 1; drop table runs; --"
    assert await table(nc, "select count(*) from runs where task_id = $t", parameters={"t": hostile}) == [[0]]
    (row,) = await table(
        nc,
        "select $text, $n + 1, $no, $list, (select count(*) from events where data is not null and $n = 1) limit $n",
        parameters={"text": hostile, "n": 1, "NO": None, "list": [1, 2]},
    )
    assert row[:4] == [hostile, 2, None, [1, 2]]
    assert row[4] > 0
    # A column of VARIANT makes the statement be wrapped in another one.
    assert await table(nc, "select data from events where kind = $k limit 1", parameters={"k": "step"})
    (row,) = await table(
        nc,
        "select count(*) from runs where turn < $n and created_at > $t and duration_seconds > $s limit $n",
        parameters={"n": "5", "t": "2026-01-01", "s": "0.5"},
    )
    assert row[0] > 0  # text is taken for what it is compared with
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "has no value"),
        ({"k": 1, "other": 2}, "no parameter"),
        ({"k": {"a": 1}}, "bad history query request"),
        ({"k": "x" * 70_000}, "larger than"),
    ]
    for parameters, message in bad:
        with pytest.raises(UsageError, match=message):
            await query(nc, "select $k", parameters=parameters)


async def test_bad_requests_are_explained(nc: Nats) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"timeout": 0}, "timeout is 0 s"),
        ({"timeout": 1e9}, "timeout is 1e"),
        ({"limit": -1}, "limit is -1"),
        ({"format": "xml"}, "bad history query request"),
    ]
    for options, message in bad:
        with pytest.raises(UsageError, match=message):
            await query(nc, "select 1", **options)


async def test_copies_are_few_and_small(nc: Nats, projector: Projector) -> None:
    home = store_of(projector).home

    def copies() -> list[Path]:
        return [path for path in home.snapshots.rglob("*.db") if path.is_file()]

    await table(nc, "select count(*) from runs")
    (first,) = copies()
    inode = first.stat().st_ino
    await table(nc, "select count(*) from runs")
    assert copies() == [first]
    await publish(nc, Life().queued().published())
    await table(nc, "select count(*) from runs")
    (second,) = copies()
    assert second != first
    assert second.stat().st_ino == inode  # the database file itself has not changed: only its journal was copied
    store_of(projector).cursor().execute("CHECKPOINT h")
    await publish(nc, Life().queued().published())
    assert await table(nc, "select count(*) from runs") == [[10]]
    assert [path.stat().st_ino for path in copies()] != [inode]


async def test_who_is_content_with_an_older_answer_gets_one(
    nc: Nats, projector: Projector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandboxes, "STALE", 3600.0)
    count = "select count(*) from runs"
    await projector.fresh()
    assert await table(nc, count, fresh=False) == [[8]]
    await publish(nc, Life().queued().published())
    await projector.fresh()
    assert await table(nc, count, fresh=False) == [[8]]
    monkeypatch.setattr(sandboxes, "STALE", 0.0)
    assert await table(nc, count, fresh=False) == [[9]]


async def test_times_are_in_utc(nc: Nats) -> None:
    ((hour, text),) = await table(nc, "select date_trunc('hour', created_at), created_at::varchar from runs limit 1")
    assert datetime.fromisoformat(hour).astimezone(UTC).hour == 12
    assert text.endswith("+00")
