"""Lists find the newest records without reading all: the same ones as a plain sort, in whatever order rows are stored."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import duckdb
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helmr.subjects import Scope
from store import newest, reads, schema
from store.reads import NOUNS

SCOPE = Scope("acme", "dev")
START = datetime(2026, 3, 1, tzinfo=UTC)
LIMIT = 3


class Stored(NamedTuple):
    """A run as far as lists care, and which table it is in."""

    minute: int
    mine: bool
    task: str
    live: bool


class Asked(NamedTuple):
    """What a list is narrowed to, and how many rows are looked at for a bound."""

    task: str | None
    since: int | None
    samples: tuple[int, ...]


ASKED = st.builds(
    Asked, st.sampled_from(["a", None]), st.sampled_from([None, 4, 13]), st.sampled_from([(1, 2), (2, 8), (4, 20)])
)
#: Few minutes, so that many runs are created at the same time; in any order, as runs end.
STORED = st.lists(
    st.builds(Stored, st.integers(0, 12), st.booleans(), st.sampled_from("ab"), st.booleans()), max_size=60
)


@pytest.fixture(scope="module")
def history() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty history in memory."""
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        for statement in schema.history_ddl():
            con.execute(statement)
        yield con


def fill(con: duckdb.DuckDBPyConnection, stored: list[Stored]) -> dict[str, Stored]:
    """Store the runs, in this order; by id."""
    ids = {f"run_{number:03}": each for number, each in enumerate(stored)}
    for table, live in (("runs_closed", False), ("runs_live", True)):
        con.execute(f"TRUNCATE {table}")
        rows = [
            (run, "acme" if each.mine else "other", each.task, START + timedelta(minutes=each.minute))
            for run, each in ids.items()
            if each.live is live
        ]
        columns = "id, project, environment, task_id, status, created_at, payload, metadata, tags, secrets"
        values = "?, ?, 'dev', ?, 'queued', ?, 'null', '{}', [], []"
        if rows:
            con.executemany(f"INSERT INTO {table} ({columns}) VALUES ({values})", rows)  # noqa: S608
    return ids


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=STORED, asked=ASKED)
def test_pages_are_those_of_a_plain_sort(
    history: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch, stored: list[Stored], asked: Asked
) -> None:
    task, since, samples = asked
    monkeypatch.setattr(newest, "_SAMPLES", samples)
    ids = fill(history, stored)
    wanted = [
        run
        for run, each in ids.items()
        if each.mine and task in {None, each.task} and (since is None or each.minute >= since)
    ]
    wanted.sort(key=lambda run: (ids[run].minute, run), reverse=True)

    listed: list[str] = []
    before, oldest = None, None if since is None else START + timedelta(minutes=since)
    while True:
        read = reads.page(NOUNS["run"], SCOPE, {"task_id": task}, since=oldest, limit=LIMIT, before=before)
        page = read(history)
        listed += [msgspec.json.decode(record)["id"] for record in page.records]
        assert len(page.records) == min(LIMIT, len(wanted) - len(listed) + len(page.records))
        if page.next is None:
            break
        before = page.next
    assert listed == wanted

    last = max((run for run in ids if ids[run].mine), key=lambda run: (ids[run].minute, run), default=None)
    assert reads.resolve(NOUNS["run"], SCOPE, None, last=True)(history) == ([last] if last else [])


def test_a_long_history_is_not_read_for_its_newest_page(history: duckdb.DuckDBPyConnection) -> None:
    fill(history, [])
    history.execute(
        """INSERT INTO runs_closed (id, project, environment, created_at)
           SELECT 'run_' || n, 'acme', 'dev', $start + to_minutes(n) FROM range(200_000) t(n)""",
        {"start": START},
    )
    mine = "project = $project AND environment = $environment"

    def bound(conditions: str, given: dict[str, Any], before: datetime | None) -> datetime:
        tables = ("runs_closed", "runs_live")
        found = newest.bound(history, tables, conditions, SCOPE._asdict() | given, before=before, count=21)
        assert found is not None
        return datetime.fromisoformat(found)

    assert bound(mine, {}, None) == START + timedelta(minutes=199_979)
    # A deeper page looks around its own place.
    upto = START + timedelta(minutes=50_000)
    assert bound(f"{mine} AND created_at <= $upto", {"upto": upto}, upto) == START + timedelta(minutes=49_980)
    # Nothing but what matches counts.
    assert bound(f"{mine} AND id = 'run_7'", {}, None) == START + timedelta(minutes=7)
