"""Saved queries of a project: names, titles, parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import saved
from cli.query import _parameters
from cli.query_shell import offers
from helmr.errors import NotFound, UsageError


def save(root: Path, name: str, text: str) -> None:
    """Put a query into a project."""
    (root / "queries").mkdir(exist_ok=True)
    (root / "queries" / f"{name}.sql").write_text(text)


def test_a_query_has_a_name_a_title_and_parameters(tmp_path: Path) -> None:
    save(tmp_path, "slow", "-- Slow runs of a task\nselect id from runs where task_id = $task limit $n -- not $this\n")
    save(tmp_path, "plain", "select '$no', \"$nor\", $$text$$, $1 /* $never */ from runs")
    found = {query.name: query for query in saved.all_of(tmp_path)}
    assert list(found) == ["plain", "slow"]
    assert (found["slow"].title, found["slow"].parameters) == ("Slow runs of a task", ["n", "task"])
    assert (found["plain"].title, found["plain"].parameters) == ("", [])
    assert saved.find(tmp_path, "slow") == found["slow"]


def test_a_name_that_is_not_there_suggests_one_that_is(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as missing:
        saved.find(tmp_path, "slow")
    assert str(tmp_path / "queries" / "slow.sql") in str(missing.value.hint)
    save(tmp_path, "slow", "select 1")
    with pytest.raises(NotFound) as missing:
        saved.find(tmp_path, "slwo")
    assert missing.value.hint == "did you mean @slow?"
    with pytest.raises(NotFound):
        saved.find(tmp_path, "../queries/slow")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save(tmp_path, "bad", "")
    (tmp_path / "queries" / "bad.sql").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"bad\.sql"):
        saved.find(tmp_path, "bad")


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=hello", "hello"),
        ("a=5", "5"),
        ("a=20260131.10", "20260131.10"),  # a version, and no number
        ("a=true", "true"),
        ("a=null", None),
        ('a="null"', "null"),
        ('a=["x","y"]', ["x", "y"]),
        ("a=[oops", "[oops"),
        ("$a=b=c", "b=c"),
        ("a=", ""),
    ],
)
def test_values_of_parameters_are_constants_in_quotes(pair: str, value: object) -> None:
    assert _parameters([pair]) == {"a": value}


@pytest.mark.parametrize("pairs", [["a"], ["=1"], ["a=1", "a=2"], ["a=1", "$a=2"]])
def test_other_parameters_are_refused(pairs: list[str]) -> None:
    with pytest.raises(UsageError, match="--param"):
        _parameters(pairs)


def test_completion_offers_commands_tables_columns_and_words_of_sql() -> None:
    columns = {"runs": [("id", "VARCHAR"), ("status", "VARCHAR")], "events": [("id", "VARCHAR")]}
    assert offers(".t", columns, [".tables", ".help"]) == [".tables"]
    assert offers("ru", columns, []) == ["runs"]
    assert offers("RUNS.s", columns, []) == []
    assert offers("runs.s", columns, []) == ["runs.status"]
    assert offers("s", columns, []) == ["status", "select", "sum", "summarize"]
