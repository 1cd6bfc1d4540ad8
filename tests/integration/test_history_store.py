"""What every history store promises (:mod:`store.history_store`), asked of each that there is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.ipc as arrow_ipc
import pytest

from bus import topology
from bus.reader import Message
from helmr import subjects
from helmr.chunks import headers
from helmr.errors import NotFound, TimedOut, UsageError
from helmr.models import Deployment, Run
from helmr.subjects import Scope
from store.history_store import Entity, HistoryStore
from store.home import Home
from store.projector import Projector
from store.question import QueryRequest
from store.reads import PAGE_BYTES
from store.search import Wanted
from store.sinks import Store
from tests.lives import SCOPE, START, Life, access, lives, messages, session, token, workspace
from tests.sqlite_store import SqliteStore

pytestmark = pytest.mark.anyio

OTHER = Scope("other", "dev")
ENTITIES: tuple[Entity, ...] = ("run", "session", "workspace", "deployment")
CREATED = {"RUNS": "2026-03-01T00:00:00Z", "LOGS": "2026-03-01T00:00:01Z"}
STORES: dict[str, Callable[[Path], HistoryStore]] = {
    "duckdb": lambda folder: Store(Home(folder)),
    "sqlite": SqliteStore,
}


class Opened:
    """A store that is opened, filled, and opened again."""

    def __init__(self, make: Callable[[Path], HistoryStore], folder: Path) -> None:
        self._make = make
        self._folder = folder
        self.store = make(folder)

    def again(self) -> None:
        """What the next process has."""
        self.store.close()
        self.store = self._make(self._folder)

    def apply(self, batch: dict[str, list[Message]]) -> None:
        """One batch, in the lanes it belongs to."""
        logs = {stream: batch[stream] for stream in batch if stream == topology.LOGS}
        rest = {stream: batch[stream] for stream in batch if stream != topology.LOGS}
        for sink, part in ((self.store.history, rest), (self.store.logs, logs)):
            if part:
                sink.created.update({stream: CREATED[stream] for stream in part if stream in CREATED})
                sink.store(sink.prepare(part))


@pytest.fixture(params=STORES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Each store in turn, empty."""
    made = Opened(STORES[request.param], tmp_path / "h")
    yield made
    made.store.close()


def told(*runs: Life) -> list[Message]:
    """The messages of runs, their sessions and workspaces."""
    published = [
        message for life in runs for message in [*session(life), *workspace(life, live=True), *life.published()]
    ]
    return messages(published)


def chunk(seq: int, life: Life, text: str, *, days: int = 0, stream: str = "stdout", attempt: int = 1) -> Message:
    """A log chunk, stored some days after the start."""
    at = START + timedelta(days=days, seconds=seq)
    fields = headers(offset=0, dispatch=1, at=at)
    return Message(
        seq, subjects.log(life.scope, life.id, attempt, stream), int(at.timestamp()) * 10**9, fields, text.encode()
    )


async def everything(store: HistoryStore) -> list[Any]:
    """All that can be asked, as JSON."""
    reads = store.answers()
    try:
        found: list[Any] = []
        for entity in ENTITIES:
            page = await reads.page(entity, SCOPE, {}, since=None, limit=1000, before=None)
            found.append([msgspec.json.decode(each) for each in page.records])
        told = [await reads.events(SCOPE, run["id"], after=0, limit=1000) for run in found[0]]
        found += told
        return list(msgspec.json.decode(msgspec.json.encode(found)))
    finally:
        reads.close()


@pytest.mark.parametrize("size", [1, 7])
async def test_wherever_batches_and_processes_end_nothing_is_lost_or_doubled(opened: Opened, size: int) -> None:
    runs = lives(8)
    log = told(*runs)
    for at in range(0, len(log), size):
        # The stream delivers again what came before: a watermark that is stored with its rows passes it over.
        opened.apply({topology.RUNS: log[max(0, at - 3) : at + size]})
        if at % 14 == 0:
            opened.again()
            assert opened.store.history.applied[topology.RUNS] == log[min(at + size, len(log)) - 1].seq
            assert opened.store.history.created[topology.RUNS] == CREATED["RUNS"]
    found = await everything(opened.store)
    assert [msgspec.convert(run, Run) for run in found[0]] == [life.record for life in reversed(runs)]
    assert [len(each) for each in found[1:3]] == [8, 8]
    kinds = [[event["kind"] for event in events] for events, _ in found[4:]]
    assert kinds == [[event.kind for event in life.events] for life in reversed(runs)]


async def test_tokens_of_both_kinds_are_listed_by_what_they_are(opened: Opened) -> None:
    asked = [token("build", "nightly", data={"ok": True}), token("build"), token(), token("build", scope=OTHER)]
    allowed = [access(uses=1, session_id="ses_1"), access(session_id="ses_2")]
    log = messages([message for each in [*asked, *allowed] for message in each])
    opened.apply({topology.RUNS: log[:3]})
    opened.again()
    opened.apply({topology.RUNS: log[3:]})
    reads = opened.store.answers()

    async def page(entity: Entity, **filters: Any) -> list[Any]:
        found = await reads.page(entity, SCOPE, filters, since=None, limit=10, before=None)
        return [msgspec.json.decode(each) for each in found.records]

    assert len(await page("token")) == 3
    assert len(await page("token", tags="build")) == 2
    assert len(await page("token", tags=["nightly", "none"])) == 1
    (done,) = await page("token", status="completed")
    assert (done["tags"], done["data"]) == (["build", "nightly"], None)
    assert (await reads.one("token", SCOPE, done["id"])).data == msgspec.Raw(b'{"ok":true}')
    (used,) = await page("access", session_id="ses_1")
    assert (used["status"], used["used"]) == ("used_up", 1)
    assert await reads.resolve("access", SCOPE, used["id"][:-1], last=False) == [used["id"]]
    reads.close()


async def test_what_was_prepared_but_not_stored_comes_again(opened: Opened) -> None:
    log = told(*lives(4))
    opened.store.history.prepare({topology.RUNS: log})
    opened.again()
    assert opened.store.history.applied.get(topology.RUNS, 0) == 0
    opened.apply({topology.RUNS: log})
    assert len((await everything(opened.store))[0]) == 4


async def test_records_are_paged_filtered_and_kept_apart(opened: Opened) -> None:
    runs, theirs = lives(16), Life(scope=OTHER).queued()
    opened.apply({topology.RUNS: told(*runs, theirs)})
    reads = opened.store.answers()

    async def ids(
        limit: int = 1000, before: str | None = None, since: datetime | None = None, **filters: Any
    ) -> list[str]:
        page = await reads.page("run", SCOPE, filters, since=since, limit=limit, before=before)
        listed = [msgspec.json.decode(each)["id"] for each in page.records]
        assert page.next == (listed[-1] if len(listed) == limit and listed[-1] != runs[0].id else None)
        return listed

    newest = [life.id for life in reversed(runs)]
    assert await ids() == newest
    assert await ids(5) == newest[:5]
    assert await ids(5, newest[4]) == newest[5:10]
    assert await ids(since=runs[10].events[0].at) == newest[:6]
    assert set(await ids(status=["failed", "cancelled"])) == {
        life.id for life in runs if life.record.status in {"failed", "cancelled"}
    }
    assert await ids(task_id="task-1", status="queued") == [
        life.id for life in reversed(runs) if (life.spec.task_id, life.record.status) == ("task-1", "queued")
    ]
    assert (await reads.one("run", SCOPE, newest[0])).id == newest[0]
    for entity_id in (theirs.id, "run_none"):
        with pytest.raises(NotFound):
            await reads.one("run", SCOPE, entity_id)
    with pytest.raises(NotFound):
        await reads.events(SCOPE, theirs.id, after=0, limit=10)
    assert await reads.resolve("run", SCOPE, None, last=True) == newest[:1]
    assert await reads.resolve("run", SCOPE, newest[3], last=False) == [newest[3]]
    assert await reads.resolve("session", SCOPE, f"ext-{newest[3]}", last=False) == [runs[12].spec.session_id]
    assert await reads.resolve("run", SCOPE, theirs.id, last=False) == []
    assert await reads.resolve("run", SCOPE, "run_", last=False) == newest[:10]
    reads.close()


async def test_sessions_workspaces_and_deployments_say_where_they_stand(opened: Opened) -> None:
    going, ended = lives(4)[3], lives(1)[0]
    made = Deployment(
        id="dep_1",
        version="20260301.1",
        project=SCOPE.project,
        environment=SCOPE.environment,
        content_hash="c",
        archive="a",
        archive_bytes=1,
        created_at=START,
        index={"tasks": []},
        current=False,
    )
    config = [
        ("$KV.config.deployment.acme.dev.dep_1", msgspec.json.encode(made)),
        ("$KV.config.current.acme.dev", b"dep_1"),
    ]
    opened.apply({topology.RUNS: told(going, ended), topology.CONFIG: messages(config)})
    opened.apply({topology.RUNS: messages(session(ended, ends="closed")[1:], first=1000)})
    found = await everything(opened.store)
    assert {each["id"]: (each["status"], each["activity"]) for each in found[1]} == {
        going.spec.session_id: ("open", "running"),
        ended.spec.session_id: ("closed", "idle"),
    }
    assert {each["state"] for each in found[2]} == {"live"}
    assert [(each["version"], each["current"]) for each in found[3]] == [("20260301.1", True)]


async def test_an_answer_fits_into_one_message(opened: Opened) -> None:
    large = [Life(payload={"text": "x" * 200_000}, start=START + timedelta(minutes=at)).queued() for at in range(6)]
    opened.apply({topology.RUNS: told(*large)})
    reads = opened.store.answers()
    listed: list[str] = []
    before = None
    while True:
        page = await reads.page("run", SCOPE, {}, since=None, limit=50, before=before)
        assert 0 < sum(map(len, map(bytes, page.records))) <= PAGE_BYTES + 201_000
        listed += [msgspec.json.decode(each)["id"] for each in page.records]
        before = page.next
        if before is None:
            break
    assert listed == [life.id for life in reversed(large)]
    reads.close()


async def test_events_come_in_pages_to_the_end(opened: Opened) -> None:
    life = lives(2)[1]
    opened.apply({topology.RUNS: told(life)})
    reads = opened.store.answers()
    cursors: list[int] = []
    ended = False
    while not ended:
        found, ended = await reads.events(SCOPE, life.id, after=cursors[-1] if cursors else 0, limit=3)
        cursors += [event.cursor for event in found]
        stored = [msgspec.json.encode(event.data) for event in found]
        assert [json.loads(each) for each in stored] == [
            json.loads(msgspec.json.encode(life.events[event.cursor - 1].data)) for event in found
        ]
    assert cursors == list(range(1, len(life.events) + 1))
    reads.close()


async def test_logs_come_in_order_over_days(opened: Opened) -> None:
    life = Life().queued().leased().add("step", {"name": "later"}, after=3 * 86_400).succeeds()
    log = told(life)
    log[-1] = log[-1]._replace(stored_ns=int(life.at.timestamp()) * 10**9)
    opened.apply({topology.RUNS: log})
    opened.apply({topology.LOGS: [chunk(at, life, f"line {at}\n", days=at % 10 // 4) for at in (1, 2, 3, 4, 5, 8, 9)]})
    opened.again()
    assert opened.store.logs.applied == {topology.LOGS: 9}
    opened.apply(
        {
            topology.LOGS: [
                chunk(9, life, "doubled?\n", days=2),
                chunk(20, life, "err\n", days=3, stream="stderr", attempt=2),
            ]
        }
    )
    reads = opened.store.answers()

    async def seqs(
        after: int = 0, limit: int = 1000, attempt: int | None = None, stream: str | None = None
    ) -> list[int]:
        found, _ = await reads.chunks(SCOPE, life.id, attempt=attempt, stream=stream, after=after, limit=limit)
        return [each.seq for each in found]

    assert await seqs() == [1, 2, 3, 4, 5, 8, 9, 20]
    assert await seqs(3, 3) == [4, 5, 8]
    assert (await reads.chunks(SCOPE, life.id, attempt=None, stream=None, after=0, limit=3))[1]
    assert await seqs(stream="stderr") == await seqs(attempt=2) == [20]
    with pytest.raises(NotFound):
        await reads.chunks(OTHER, life.id, attempt=None, stream=None, after=0, limit=3)
    reads.close()


async def test_logs_are_searched(opened: Opened) -> None:
    life, theirs = Life(task_id="loud").queued(), Life(scope=OTHER).queued()
    opened.apply({topology.RUNS: told(life, theirs)})
    text = "".join(f"line {at}\n" for at in range(40))
    opened.apply({topology.LOGS: [chunk(1, life, text), chunk(2, theirs, "line 7\n"), chunk(3, life, text, days=1)]})
    reads = opened.store.answers()

    async def lines(pattern: str, **more: Any) -> list[tuple[int, int, str]]:
        found, after = [], None
        while True:
            part, after = await reads.search(SCOPE, Wanted(pattern, **more), after)
            found += [(match.seq, match.line, match.text) for match in part]
            if after is None:
                return found

    assert await lines("line 7") == [(1, 8, "line 7"), (3, 8, "line 7")]
    assert await lines("LINE 7", ignore_case=True, since=START + timedelta(hours=1)) == [(3, 8, "line 7")]
    assert len(await lines("^line 1[0-9]$", regex=True)) == 20
    assert len(await lines("line", task="loud", run_id=life.id, stream="stdout")) == 80
    assert await lines("line", task="quiet") == []
    found, _ = await reads.search(SCOPE, Wanted("line 9", context=2), None)
    assert (found[0].before, found[0].after) == (["line 7", "line 8"], ["line 10", "line 11"])
    reads.close()


class Asked:
    """What runs users' SQL over a store."""

    def __init__(self, store: HistoryStore) -> None:
        self.runner = store.sql(Projector(None, store))  # type: ignore[arg-type]  # it is not run, and asks nobody

    async def run(self, sql: str, *, scope: Scope = SCOPE, **more: Any) -> tuple[list[Any], str | None]:
        """The rows, and which cap cut them off."""
        parts: list[bytes] = []

        async def send(part: bytes) -> None:
            parts.append(part)

        request = QueryRequest(sql=sql, fresh=False, **{"format": "json", **more})
        summary = await self.runner.run(scope, request, send)
        body = b"".join(parts)
        if request.format == "arrow":
            return arrow_ipc.open_stream(body).read_all().to_pylist(), summary.truncated
        return [json.loads(line) for line in body.splitlines()[1:]], summary.truncated


@pytest.fixture
async def sql(opened: Opened) -> AsyncIterator[Asked]:
    """SQL over runs of two projects."""
    opened.apply({topology.RUNS: told(*lives(8), Life(scope=OTHER).queued())})
    opened.apply({topology.LOGS: [chunk(1, lives(1)[0], "said\n")]})
    asked = Asked(opened.store)
    await asked.runner.start()
    yield asked
    await asked.runner.close()


async def test_sql_reads_what_belongs_to_the_scope(sql: Asked) -> None:
    assert await sql.run("select count(*) from runs") == ([[8]], None)
    assert await sql.run("select count(*) from runs", scope=OTHER) == ([[1]], None)
    assert await sql.run("select count(*) from logs where bytes = $n", parameters={"n": 5}) == ([[1]], None)
    assert await sql.run("select kind from events order by seq", limit=2) == ([["queued"], ["leased"]], "rows")
    found, _ = await sql.run("select status, count(*) as n from runs group by 1 order by 1", format="arrow")
    assert found[0] == {"status": "cancelled", "n": 1}


async def test_sql_that_wants_more_is_refused(sql: Asked) -> None:
    for statement in (
        "delete from runs_live",
        "insert into projection values ('x', 1, null, null)",
        "drop table events",
        "create table t (i int)",
        "attach ':memory:' as other",
        "pragma table_info('runs')",
        "select * from runs_closed",
        "select * from main.runs_closed",
        "with x as (delete from runs returning *) select * from x",
        "select 1; select 2",
        "nonsense",
    ):
        with pytest.raises(UsageError):
            await sql.run(statement)
    assert await sql.run("select count(*) from runs") == ([[8]], None)


async def test_sql_ends_at_its_deadline(sql: Asked) -> None:
    endless = "with recursive r(i) as (select 1 union all select i + 1 from r) select max(i) from r"
    async with asyncio.timeout(60):
        with pytest.raises(TimedOut):
            await sql.run(endless, timeout=0.3)
