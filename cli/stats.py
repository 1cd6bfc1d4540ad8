"""``helmr stats``: how tasks do, why they fail, what is slow, and whether the last deployment made it worse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cli import charts, comparison
from cli.controls import printable
from cli.options import DURATION, Choice, Command, Group, ask, flags
from cli.output import age, json_value, line, note, on_terminal, table, working
from helmr.durations import format_seconds
from helmr.errors import NotFound, UsageError
from store import stats as sql

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

Row = dict[str, Any]

#: Columns of a chart over time; spans of time are as wide as it takes to stay below.
_SPANS = 60
_WIDTHS = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400, 30 * 86400)
_MESSAGE = 100
#: Rows that no answer of these questions exceeds in practice.
_ROWS = 100_000


class Period(NamedTuple):
    """From when until now, cut into spans of ``width`` seconds that begin where DuckDB's time_bucket has them begin."""

    since: datetime
    until: datetime
    width: int

    @classmethod
    def last(cls, seconds: float) -> Period:
        """The last so many seconds."""
        until = datetime.now(UTC)
        width = next((each for each in _WIDTHS if seconds / each <= _SPANS), _WIDTHS[-1])
        return cls(until - timedelta(seconds=seconds), until, width)

    @property
    def spans(self) -> int:
        """How many spans there are."""
        return int((self.until.timestamp() // self.width) - (self.since.timestamp() // self.width)) + 1

    def place(self, begins_at: str) -> int:
        """Which of them begins at this time."""
        begin = datetime.fromisoformat(begins_at).timestamp()
        return int(begin // self.width - self.since.timestamp() // self.width)


_task = click.option("--task", metavar="TASK", help="Only runs of this task.")
_since = click.option(
    "--since", type=DURATION, default="1d", show_default=True, metavar="D", help="Only what was created in this time."
)


class _Questions(Group):
    """A group that is also a command: without a verb it answers the first question."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the first question's name where none was given."""
        if not self._names_one(ctx, args):
            args = ["tasks", *args]
        return super().parse_args(ctx, args)

    def _names_one(self, ctx: click.Context, args: list[str]) -> bool:
        params = [*self.commands["tasks"].get_params(ctx)]
        valued = {
            name for param in params if isinstance(param, click.Option) and not param.is_flag for name in param.opts
        }
        is_value = False
        for arg in args:
            if arg in {"--help", "-h"} or (not is_value and not arg.startswith("-")):
                return True
            is_value = arg in valued
        return False


@click.group(cls=_Questions)
def stats() -> None:
    """Answer the usual questions about runs: without a verb, how the tasks do.

    \b
    Examples:
      helmr stats --since 7d
      helmr stats failures --task review
      helmr stats compare 20260131.1 20260131.2
    """


def _answers(*questions: tuple[str, Row]) -> list[list[Row]]:
    """The rows of several statements, asked at the same time."""

    async def asking(client: AsyncClient) -> list[list[Row]]:
        return await asyncio.gather(*(client.query_json(text, values, limit=_ROWS) for text, values in questions))

    with working("asking"):
        return ask(asking)


@stats.command()
@_task
@_since
def tasks(task: str | None, since: float) -> None:
    """How the tasks do: runs, success, waiting, durations.

    Throughput, success, queue wait, duration, retries and time in wait, by task and over time.
    """
    period = Period.last(since)
    asked = {"since": period.since.isoformat(), "task": task}
    found, spans = _answers((sql.TASKS, asked), (sql.SPANS, asked | {"width": f"{period.width} seconds"}))
    total, by_task = found[0], found[1:]
    if flags().json:
        del total["task_id"]
        json_value(
            {"since": period.since, "width_seconds": period.width, "all": total, "tasks": by_task, "spans": spans}
        )
    elif not total["runs"]:
        note(_nothing("runs", task, since))
    else:
        _show_tasks(period, total, by_task, spans)


def _show_tasks(period: Period, total: Row, by_task: list[Row], spans: list[Row]) -> None:
    seconds = (period.until - period.since).total_seconds()
    series = {name: _series(period, spans, name) for name in _names(by_task)}
    columns = [
        "TASK",
        "RUNS",
        "ACTIVE",
        "OK",
        "FAILED",
        "RETRIES",
        "QUEUE p50/p95/p99",
        "DURATION p50/p95/p99",
        "WAITING",
    ]
    rows = [_task_row(row["task_id"], row) for row in by_task]
    if len(by_task) > 1:
        rows.append(_task_row("all", total))
    table(columns, rows)
    line("")
    runs = charts.rate(total["runs"], seconds)
    line(f"runs: {runs}, over the last {format_seconds(seconds)}; each column is {format_seconds(period.width)}")
    line("")
    every = _series(period, spans)
    shown = [(name, charts.sparkline(values), _peak(values)) for name, values in series.items()]
    shown += [("all", charts.sparkline(every), _peak(every))] if len(series) > 1 else []
    failed = charts.fill(((period.place(row["begins_at"]), row["failed"]) for row in spans), period.spans)
    if any(failed):
        shown.append(("failed", charts.sparkline(failed), _peak(failed)))
    table(["TASK", "RUNS OVER TIME", "PEAK"], shown)


def _names(by_task: list[Row]) -> list[str]:
    return [row["task_id"] for row in by_task[:10]]


def _series(period: Period, spans: list[Row], task: str | None = None) -> list[float]:
    found = ((period.place(row["begins_at"]), row["runs"]) for row in spans if task in {None, row["task_id"]})
    return charts.fill(found, period.spans)


def _peak(values: list[float]) -> str:
    return f"{max(values):g}"


def _task_row(name: str, row: Row) -> tuple[object, ...]:
    return (
        name,
        row["runs"],
        row["runs"] - row["ended"],
        _percent(row["success_rate"]),
        row["failed"],
        row["retries"],
        _seconds(row, "queue"),
        _seconds(row, "duration"),
        format_seconds(row["wait_seconds"]),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _seconds(row: Row, name: str) -> str:
    values = [row[f"{name}_p{at}"] for at in (50, 95, 99)]
    return " / ".join("-" if value is None else format_seconds(value) for value in values)


def _nothing(what: str, task: str | None, since: float) -> str:
    of_task = f" of task {task}" if task else ""
    return f"no {what}{of_task} in the last {format_seconds(since)}; look further back with --since"


@stats.command()
@_task
@_since
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Kinds of failure at most.")
def failures(task: str | None, since: float, limit: int) -> None:
    """Why runs failed, with an example each.

    By code and message, without the numbers and ids in it.
    """
    period = Period.last(since)
    (found,) = _answers((sql.FAILURES, {"since": period.since.isoformat(), "task": task, "limit": limit}))
    if flags().json:
        json_value(found)
    elif not found:
        note(_nothing("failed runs", task, since))
    else:
        _show_failures(found)


def _show_failures(found: list[Row]) -> None:
    top = found[0]["runs"]
    rows = [
        (
            row["runs"],
            charts.bar(row["runs"], top, 10),
            row["code"],
            ", ".join(row["tasks"]),
            age(datetime.fromisoformat(row["first_seen_at"])),
            age(datetime.fromisoformat(row["last_seen_at"])),
            row["example"],
            _short(row["pattern"]),
        )
        for row in found
    ]
    table(["RUNS", "", "CODE", "TASKS", "FIRST SEEN", "LAST SEEN", "EXAMPLE", "MESSAGE"], rows)
    if on_terminal():
        note(f"helmr run get {found[0]['example']} tells more about one", dim=True)


def _short(text: str | None) -> str:
    shown = printable(text or "")
    return shown if len(shown) <= _MESSAGE else f"{shown[: _MESSAGE - 1]}…"


@stats.command()
@_task
@_since
@click.option(
    "--by",
    type=Choice(["duration", "queue", "active", "wait"]),
    default="duration",
    show_default=True,
    help="duration: from first lease to end; queue: until the first lease; active: executing; wait: in waits.",
)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Runs at most.")
def slow(task: str | None, since: float, by: str, limit: int) -> None:
    """The runs that took longest, beside their task's median."""
    period = Period.last(since)
    asked = {"since": period.since.isoformat(), "task": task, "by": by, "limit": limit}
    (found,) = _answers((sql.SLOW, asked))
    if flags().json:
        json_value(found)
    elif not found:
        note(_nothing("ended runs", task, since))
    else:
        table(["RUN", "TASK", "STATUS", "TRIES", by.upper(), "", "MEDIAN", "TIMES", "CREATED"], _slow_rows(found))


def _slow_rows(found: list[Row]) -> list[tuple[object, ...]]:
    top = found[0]["seconds"]
    return [
        (
            row["id"],
            row["task_id"],
            row["status"],
            row["attempts"],
            format_seconds(row["seconds"]),
            charts.bar(row["seconds"], top, 10),
            format_seconds(row["median_seconds"]),
            "-" if row["times_median"] is None else f"{row['times_median']:.1f}x",
            age(datetime.fromisoformat(row["created_at"])),
        )
        for row in found
    ]


@stats.command(cls=Command)
@click.argument("version_a", required=False)
@click.argument("version_b", required=False)
@_task
def compare(version_a: str | None, version_b: str | None, task: str | None) -> None:
    """Did a deployment make it worse?

    VERSION_A beside VERSION_B; without them, the last two that ran.

    A difference is called better or worse only where chance is no likely cause: the success rate by a test of two
    proportions (Fisher's, 5 %), the duration where the medians differ by a fifth, with 20 runs or more on both sides; where
    there are fewer, and nothing differs, it says so instead of "same".
    """
    if version_a is None or version_b is None:
        if version_a is not None:
            raise UsageError("compare needs two versions, or none", hint="helmr deployment list shows them")
        version_a, version_b = _latest_versions()
    (found,) = _answers((sql.COMPARE, {"a": version_a, "b": version_b, "task": task}))
    compared = comparison.compare(found, version_a, version_b)
    missing = {version_a, version_b} - {row["version"] for row in found}
    if missing:
        raise NotFound(f"no run of version {min(missing)} has ended here", hint="helmr deployment list shows versions")
    if flags().json:
        json_value({"a": version_a, "b": version_b, "tasks": compared})
        return
    columns = ["TASK", "RUNS", "OK", "SUCCESS", "DURATION p50", "DURATION p95", "RETRIES A RUN", "VERDICT"]
    table(columns, [_compared_row(each) for each in compared])
    note(f"{version_a} -> {version_b}", dim=True)


def _latest_versions() -> tuple[str, str]:
    (found,) = _answers((sql.LATEST_VERSIONS, {}))
    if len(found) < 2:
        raise NotFound("fewer than two versions have run here", hint="deploy and run a second one, then compare")
    return found[1]["version"], found[0]["version"]


def _compared_row(each: comparison.Compared) -> tuple[object, ...]:
    a, b = each.a, each.b

    def both(show: Callable[[comparison.Side], str]) -> str:
        return f"{show(a) if a else '-'} -> {show(b) if b else '-'}"

    def duration(value: float | None) -> str:
        return "-" if value is None else format_seconds(value)

    return (
        each.task_id,
        both(lambda side: str(side.runs)),
        both(lambda side: str(side.succeeded)),
        both(lambda side: _percent(side.success_rate)),
        both(lambda side: duration(side.duration_p50)),
        both(lambda side: duration(side.duration_p95)),
        both(lambda side: f"{side.retries / side.runs:.2f}"),
        each.verdict if not each.reasons else f"{each.verdict}: {'; '.join(each.reasons)}",
    )
