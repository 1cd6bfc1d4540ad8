"""``helmr top``: queues, workers, runs and rates as they change, on a terminal or as JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import termios
import tty
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli.board import Board, LiveEvent, RunLine, Snapshot
from cli.charts import bar
from cli.controls import printable
from cli.options import DURATION, Command, ask, flags
from cli.output import STATUS_COLOURS, json_line, on_terminal
from helmr import subjects
from helmr.durations import format_seconds
from helmr.errors import HelmrError, UsageError
from helmr.events import RUN_KINDS, TERMINAL, now
from helmr.subjects import JOURNAL_KINDS

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from rich.console import RenderableType
    from rich.table import Table

    from bus.presence import Presence, WorkerInfo
    from helmr.client.aio import AsyncClient

log = logging.getLogger(__name__)

#: The kinds of event that change what is shown; ``queued`` is followed by its lane and priority.
_KINDS = tuple("queued.>" if kind == "queued" else kind for kind in RUN_KINDS if kind not in JOURNAL_KINDS)
#: Seconds between pictures, at least; and at most, because ages grow.
_FASTEST, _SLOWEST = 0.2, 1.0
_RECONNECT_LOOK = 1.0
#: Runs on the screen.
_RUNS = 12


@click.command(cls=Command)
@click.option(
    "--interval", type=DURATION, default="1s", show_default=True, metavar="D", help="Between JSON lines, at least."
)
@click.option("--count", type=click.IntRange(1), help="End after so many JSON lines.")
def top(interval: float, count: int | None) -> None:
    """Watch queues, workers and runs as they change; q or Ctrl-C leaves.

    With --json, one snapshot per line: the first at once, then one after each change, but no faster than --interval.
    """
    as_json = flags().json
    if not as_json and not (on_terminal() and sys.stdin.isatty()):
        raise UsageError("top needs a terminal", hint="helmr top --json writes one snapshot per line")
    if count is not None and not as_json:
        raise UsageError("--count goes with --json")

    async def watching(client: AsyncClient) -> None:
        async with _watch(client) as watch:
            if as_json:
                await _print(watch, interval, count)
            else:
                await _show(watch)

    ask(watching)


class _Watch:
    """The board, the workers, and the event that tells of a change."""

    def __init__(self, client: AsyncClient, presence: Presence) -> None:
        self.client = client
        self.board = Board(now())
        self.changed = asyncio.Event()
        self._presence = presence
        self._decode = msgspec.json.Decoder(LiveEvent).decode

    def hear(self, msg: Msg) -> None:
        """Take a live event."""
        try:
            self.board.take(self._decode(msg.data))
        except msgspec.DecodeError as error:  # of a newer version: to be ignored by readers
            log.debug("%s: %s", msg.subject, error)
        self.changed.set()

    async def load(self) -> None:
        """Ask for the live runs, to begin with or because messages may have been missed."""
        self.board.begin(await self.client.runs.live(), await self.client.queues.list())
        self.changed.set()

    async def reload(self) -> None:
        """Ask again after every reconnect; nats-py tells nobody but the connection itself."""
        wire = self.client.wire
        seen = wire.reconnects
        while True:
            await asyncio.sleep(_RECONNECT_LOOK)
            if wire.reconnects == seen:
                continue
            try:
                seen_now = wire.reconnects
                await self.load()
                seen = seen_now
            except HelmrError as error:
                log.info("asking again: %s", error)

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers that are alive."""
        return sorted(self._presence.alive().values(), key=lambda worker: worker.id)


@contextlib.asynccontextmanager
async def _watch(client: AsyncClient) -> AsyncIterator[_Watch]:
    from bus.presence import Presence

    wire = client.wire
    presence = Presence(wire.nc)
    watch = _Watch(client, presence)
    async with contextlib.AsyncExitStack() as stack:
        for kind in _KINDS:
            await stack.enter_async_context(wire.subscribe(subjects.live(wire.scope, "run", "*", kind), watch.hear))
        await watch.load()
        tasks = [asyncio.create_task(presence.watch()), asyncio.create_task(watch.reload())]
        try:
            await presence.ready.wait()
            yield watch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _print(watch: _Watch, interval: float, count: int | None) -> None:
    loop = asyncio.get_running_loop()
    printed = 0
    while True:
        watch.changed.clear()
        begun = loop.time()
        json_line(_as_record(watch))
        printed += 1
        if count is not None and printed >= count:
            return
        await watch.changed.wait()
        await asyncio.sleep(max(begun + interval - loop.time(), 0))


def _as_record(watch: _Watch) -> dict[str, Any]:
    snapshot: dict[str, Any] = msgspec.to_builtins(watch.board.snapshot(now()), builtin_types=())
    return snapshot | {"workers": watch.workers}


async def _show(watch: _Watch) -> None:
    """Draw until q, Ctrl-C or SIGTERM."""
    from rich.console import Console
    from rich.live import Live

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with _keys(loop, stop), Live(console=Console(), screen=True, auto_refresh=False) as live:
        while not stop.is_set():
            watch.changed.clear()
            live.update(_picture(watch.board.snapshot(now()), watch.workers, live.console.height), refresh=True)
            await _first(stop.wait(), watch.changed.wait(), timeout=_SLOWEST)
            await _first(stop.wait(), timeout=_FASTEST)


async def _first(*waits: Any, timeout: float) -> None:  # noqa: ASYNC109
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


@contextlib.contextmanager
def _keys(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """Hear single keys while a block runs, and leave the terminal as it was."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed() -> None:
        if os.read(terminal, 1) in {b"q", b"Q", b"\x04", b""}:
            stop.set()

    try:
        tty.setcbreak(terminal)
        loop.add_reader(terminal, pressed)
        yield
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _picture(shot: Snapshot, workers: list[WorkerInfo], height: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text.from_markup(_headline(shot)), Text()]
    parts += [_queue_table(shot), Text(), _worker_table(workers, Counter(run.worker for run in shot.running)), Text()]
    room = max(height - 12 - len(shot.queues) - len(workers), 3)
    shown = shot.running[: min(_RUNS, room)]
    title = f"RUNNING ({len(shown)} of {len(shot.running)}, longest first)"
    parts.append(_run_table(title, shown))
    left = room - len(shown) - 2
    if shot.recent and left > 0:
        parts += [Text(), _run_table("ENDED LAST", shot.recent[:left])]
    return Group(*parts)


def _headline(shot: Snapshot) -> str:
    totals = "  ".join(f"[bold]{count}[/] {name}" for name, count in shot.totals.items())
    rates = "  ".join(
        f"{shot.rates[name]:g} {name}"
        for name in ("started", *sorted(TERMINAL))
        if name == "started" or shot.rates[name]
    )
    return f"{totals}   [dim]a minute:[/] {rates}   [dim]{shot.at.astimezone():%H:%M:%S}  q leaves[/]"


def _queue_table(shot: Snapshot) -> RenderableType:
    found = _table("QUEUE", "LIMIT", "HELD", "QUEUED", "", "RUNNING", "WAITING", "OLDEST")
    top = max((line.held + line.queued for line in shot.queues), default=0)
    for line in shot.queues:
        depth = bar(line.held + line.queued, top, 12)
        oldest = format_seconds(line.oldest_seconds) if line.oldest_seconds else ""
        limit = "" if line.limit is None else line.limit
        counts = (limit, line.held, line.queued, depth, line.running, line.waiting)
        found.add_row(line.queue or "(none)", *map(str, counts), oldest)
    return found


def _worker_table(workers: list[WorkerInfo], known: Counter[str | None]) -> RenderableType:
    """What a worker says of itself is up to a heartbeat old; ``known`` are the runs of it that are on the board."""
    found = _table("WORKER", "GROUP", "ENGINE", "BUSY", "", "")
    for worker in workers:
        running = max(worker.running, known[worker.id])
        chart = bar(running, worker.slots, 12)
        cells = (worker.id, worker.group, worker.engine, f"{running} of {worker.slots}", chart, worker.condition)
        found.add_row(*map(printable, cells))
    return found


def _run_table(title: str, runs: list[RunLine]) -> RenderableType:
    found = _table(title, "TASK", "STATUS", "TRY", "TIME", "WORKER")
    for run in runs:
        status = f"[{STATUS_COLOURS.get(run.status, 'white')}]{run.status}[/]"
        attempt = str(run.attempt or "")
        found.add_row(run.id, printable(run.task_id), status, attempt, format_seconds(run.seconds), run.worker or "")
    return found


def _table(*columns: str) -> Table:
    from rich import table

    found = table.Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        found.add_column(name, no_wrap=True)
    return found
