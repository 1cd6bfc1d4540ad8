"""The guard of users' SQL: what people ask passes, and nothing else does."""

from __future__ import annotations

import duckdb
import pytest

from helmr.errors import HelmrError, TooLarge, UsageError
from store import sql_guard
from store.schema import VISIBLE

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


REFUSED = [
    # writing
    "insert into runs values (1)",
    "update runs set status = 'x'",
    "delete from runs",
    "drop table runs",
    "create table t(i int)",
    "create temp table t as select 1",
    "alter table runs rename to x",
    "merge into runs using events on true when matched then delete",
    "truncate runs",
    "with x as (insert into runs select * from runs returning *) select * from x",
    "with x as (delete from runs returning *) select * from x",
    "with x as (update runs set status = 'x' returning *) select * from x",
    "with x as (copy (select 1) to '/tmp/f') select 1",
    "select * from runs where id in (with x as (delete from runs returning id) select id from x)",
    # files
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/proc/self/environ')",
    "select * from '/etc/passwd'",
    'select * from "/etc/passwd"',
    "select * from glob('/*')",
    "copy runs to '/tmp/f'",
    "copy runs from '/tmp/f'",
    "export database '/tmp/x'",
    "import database '/tmp/x'",
    "attach '/tmp/x.db'",
    "attach ':memory:' as m",
    "select * from parquet_scan('x')",
    "select * from sniff_csv('x')",
    "install httpfs",
    "load httpfs",
    # settings and the catalog
    "set memory_limit = '100GB'",
    "reset memory_limit",
    "pragma database_list",
    "call duckdb_settings()",
    "use memory",
    "select * from duckdb_settings()",
    "select * from duckdb_databases()",
    "select * from duckdb_tables",
    "select * from information_schema.tables",
    "select * from sqlite_master",
    "select * from pg_catalog.pg_tables",
    "select current_setting('memory_limit')",
    "select getvariable('x')",
    "show databases",
    "show all tables",
    "select * from pragma_table_info('runs')",
    "with duckdb_tables as (select 1) select * from duckdb_tables",
    "with a as (select * from duckdb_databases), duckdb_databases as (select 1) select * from a",
    "with tables as (select 1) select * from tables",
    # running other SQL
    "select * from query('drop table runs')",
    "select * from query_table('runs')",
    "prepare p as select 1",
    "execute p",
    "select json_execute_serialized_sql('{}')",
    "select * from json_execute_serialized_sql('{}')",
    "select json_serialize_sql('select 1')",
    # other databases and other tables
    "select * from h.main.runs",
    "select * from h.runs_closed",
    "select * from runs_closed",
    "select * from projection",
    "select * from temp.x",
    "select * from runs at (version => 1)",
    # huge values and lost time
    "select repeat('x', 2000000000)",
    "select repeat('x', 2000000000) || repeat('y', 2000000000)",
    "select range(400000000)",
    "select unnest(generate_series(1, 3000000000))",
    "select levenshtein(text, text) from logs",
    "select lpad('x', 2000000000, 'y')",
    "select format('{:1000000000}', 1)",
    "select list_resize([1], 1000000000)",
    "select sleep_ms(100000)",
    "select 'x'.repeat(2000000000)",
    "select list_transform([1], lambda x: repeat('x', 2000000000))",
    "select x from runs order by repeat('x', 2000000000)",
    "select * from runs limit (select len(range(400000000)))",
    # sequences and sessions
    "select nextval('s')",
    "begin",
    "commit",
    "checkpoint",
    "force checkpoint",
    "vacuum",
    # statements
    "select 1; select 2",
    "select 1; drop table runs",
    "",
    "   ;  ",
    "-- nothing",
    "explain analyze select * from runs",
    "explain delete from runs",
    "explain analyse delete from runs",
    "explain (analyze) select 1",
    "select $1",
    "select ?",
    "select * from nowhere",
    "pivot runs on status",
    "select * from write_log('x')",
    "select 1\0",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_everything_else_is_refused(sql: str) -> None:
    with pytest.raises(HelmrError):
        check(sql)


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
