"""The guard of users' SQL: what people ask passes, and nothing else does."""

from __future__ import annotations

import duckdb
import pytest

from helmr.errors import HelmrError, TooLarge, UsageError
from store import sql_guard
from store.schema import VISIBLE
from tests.hostile import BOMBS, MISDIRECTED, REFUSED

PARSE = sql_guard.duckdb_parser(duckdb.connect(":memory:").execute)


def check(sql: str) -> sql_guard.Checked:
    """Check with a real parser."""
    return sql_guard.check(sql, PARSE)


PASSING = [
    ("select status, count(*) from runs group by all", {"runs"}),
    ("FROM Runs", {"runs"}),
    ("select * from main.runs", {"runs"}),
    ("select payload->>'pr', payload.pr, metadata->'a'->>'b' from runs", {"runs"}),
    (
        "with slow as (select * from runs where duration_seconds > 60) select task_id, count(*) from slow group by 1",
        {"runs"},
    ),
    ("with logs as (select * from logs) select * from logs", {"logs"}),
    ("with recursive n(i) as (select 1 union all select i + 1 from n where i < 5) select * from n", set()),
    ("select r.id, e.kind from runs r join events e on e.run_id = r.id left join attempts a using (run_id)", None),
    (
        "select * from runs where created_at > now() - interval 1 day order by created_at desc limit 10 offset 5",
        {"runs"},
    ),
    (
        "select date_trunc('hour', created_at) h, quantile_cont(duration_seconds, [.5, .95]) from runs group by h",
        {"runs"},
    ),
    ("select count(*) filter (status = 'failed') / count(*), string_agg(distinct task_id, ',') from runs", {"runs"}),
    (
        "select *, row_number() over (partition by task_id order by created_at desc) n from runs qualify n <= 3",
        {"runs"},
    ),
    ("select * exclude (payload) replace (upper(status) as status) from runs", {"runs"}),
    ("select unnest(tags) t, count(*) from runs group by 1", {"runs"}),
    ("select list_transform(tags, lambda t: t || '!'), [x for x in tags if x like 'a%'] from runs", {"runs"}),
    ("select case when attempt > 1 then 'again' else 'first' end, coalesce(queue, '-') from runs", {"runs"}),
    ("select at, kind from events where at > '2026-01-01' order by at", {"events"}),
    ("select at at time zone 'Europe/Berlin' from events", {"events"}),
    ("select data.name::varchar, data.result[1] from events", {"events"}),
    ("select * from range(10) t(i), generate_series(1, 3)", set()),
    ("select key, value from runs, json_each(payload)", {"runs"}),
    ("select * from (select id from runs union all select id from sessions) order by 1", {"runs", "sessions"}),
    ("select * from runs tablesample 10%", {"runs"}),
    ("select text from logs where run_id in (select id from runs where status = 'failed')", {"logs", "runs"}),
    ("values (1), (2)", set()),
    ("describe runs", {"runs"}),
    ("summarize runs;", {"runs"}),
    ("show tables", set()),
    ("explain select * from runs", {"runs"}),
    ("select 1 -- a comment; with a semicolon", set()),
    ("from task_health", {"task_health"}),
]


@pytest.mark.parametrize(("sql", "tables"), PASSING)
def test_what_people_ask_passes(sql: str, tables: set[str] | None) -> None:
    found = check(sql)
    assert tables is None or found.tables == tables


@pytest.mark.parametrize("sql", REFUSED)
def test_everything_else_is_refused(sql: str) -> None:
    with pytest.raises(HelmrError):
        check(sql)


@pytest.mark.parametrize("sql", [*MISDIRECTED, *BOMBS])
def test_what_only_the_engine_can_stop_is_one_select_without_a_writer(sql: str) -> None:
    assert check(sql).sql == sql


def test_every_parameter_has_a_value_and_every_value_a_parameter() -> None:
    sql = "select $a, $B from runs where id = $a limit $n"
    assert sql_guard.check(sql, PARSE, {"a", "b", "n"}).tables == {"runs"}
    with pytest.raises(UsageError, match=r"parameter \$n has no value"):
        sql_guard.check(sql, PARSE, {"a", "b"})
    with pytest.raises(UsageError, match=r"no parameter \$m") as raised:
        sql_guard.check(sql, PARSE, {"a", "b", "m", "n"})
    assert raised.value.hint == "its parameters: $a, $b, $n"


def test_a_parameter_is_no_name() -> None:
    for sql in ("select * from $t", "select $f(1)", "select id from runs order by $a asc, x.$b"):
        with pytest.raises(UsageError):
            sql_guard.check(sql, PARSE, {"t", "f", "a", "b"})


def test_nesting_ends_in_an_answer() -> None:
    assert check("select " + "(" * 100 + "1" + ")" * 100).tables == frozenset()
    with pytest.raises(UsageError):
        check("select " + "(" * 20_000 + "1" + ")" * 20_000)


def test_a_text_of_any_length_is_not_even_parsed() -> None:
    with pytest.raises(TooLarge, match="65536 are allowed"):
        check("select 1 in (" + ",".join(map(str, range(20_000))) + ")")


@pytest.mark.parametrize(
    ("sql", "line", "column"),
    [
        ("selec 1", "selec 1", 0),
        ("select id\nfrom runs\nwhere where", "where where", 6),
        ("select é, at fromm runs x y", "select é, at fromm runs x y", 19),
        ("select at,\n at, é, repeat('x', 2)", " at, é, repeat('x', 2)", 8),
        ("explain select 1 from runz", "select 1 from runz", 14),
        ("select at from h.main.runs", "select at from h.main.runs", 15),
    ],
)
def test_errors_point_at_the_place(sql: str, line: str, column: int) -> None:
    with pytest.raises(UsageError) as raised:
        check(sql)
    assert raised.value.details["excerpt"].split("\n") == [line, " " * column + "^"]


def test_unknown_tables_are_told_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no table 'runz'") as raised:
        check("select * from runz")
    assert raised.value.hint is not None
    assert all(name in raised.value.hint for name in VISIBLE)


def test_no_cte_can_hide_a_view_of_the_system() -> None:
    con = duckdb.connect(":memory:")
    names = [name for (name,) in con.execute("SELECT view_name FROM duckdb_views() WHERE internal").fetchall()]
    assert len(names) > 20
    for name in names:
        with pytest.raises(UsageError, match="cannot be named"):
            check(f"with {name} as (select 1) select 1")


def test_every_listed_function_exists() -> None:
    con = duckdb.connect(":memory:")
    known = {name.lower() for (name,) in con.execute("SELECT function_name FROM duckdb_functions()").fetchall()}
    grammar = {"->", "coalesce", "ifnull"}
    assert known | grammar >= sql_guard.FUNCTIONS | sql_guard.TABLE_FUNCTIONS
