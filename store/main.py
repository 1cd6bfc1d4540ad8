"""The projector's process: ``python -m store.main --url nats://… --home DIR``.

It needs an existing set of streams, runs until SIGTERM or SIGINT, finishes the batch it is writing, and ends with 0; with
1 when the database or the log forbids to go on, after saying why on stderr. Nothing is lost however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import duckdb
from nats.aio.client import Client as Nats

from bus.allocator import keep_buffers
from bus.services.endpoint import serve
from helmr.connection import connect
from helmr.errors import HelmrError, Unavailable, cause
from helmr.version import __version__
from store import files
from store.archive import Archive
from store.history import History
from store.home import Home
from store.projector import Projector
from store.queries import QUERY_NAME, Queries
from store.retention import Retention
from store.sinks import Store

log = logging.getLogger("helmr.history")

#: Seconds in which NATS should know of the services.
_PATIENCE = 60
#: The history may lag when there is more to do than processors: runs come first.
NICENESS = 5


def tune_interpreter() -> None:
    """Suit the interpreter to three threads that receive, fold and write side by side.

    The cyclic garbage collector runs rarely: batches of 5,000 rows would keep it busy for nothing. The lock changes hands
    after 0.1 ms, not 5: DuckDB's client takes it about a hundred times per transaction, and waited for it most of the time
    (24,000 events a second instead of 31,000).
    """
    gc.set_threshold(100_000, 20, 50)
    sys.setswitchinterval(1e-4)


async def run(url: str, home: Path, *, token: str | None = None, retention: Retention) -> None:
    """Project and answer until a signal comes.

    Raises:
        HelmrError: the history cannot be kept: the log is another one, the files are in use, the database failed.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gone = asyncio.Event()

    async def closed() -> None:
        gone.set()

    store = Store(Home(home))
    try:
        nc = await connect(url, name="helmr-history", token=token, on_closed=closed)
        try:
            async with serving(nc, store, retention):
                await nc.flush(_PATIENCE)  # so that whoever hears of it finds somebody to ask
                print(f"helmr history ready (pid {os.getpid()}, {store.home.root})", file=sys.stderr, flush=True)  # noqa: T201
                await _either(stop, gone)
        finally:
            await nc.close()
    finally:
        store.close()
    if gone.is_set() and not stop.is_set():
        raise Unavailable("the connection to NATS was closed for good", hint="start the projector again")


@asynccontextmanager
async def serving(nc: Nats, store: Store, retention: Retention | None = None) -> AsyncIterator[Projector]:
    """Project the log into ``store``, answer requests, and archive what ``retention`` says, for the length of the block.

    Raises:
        ConfigError: the log is not the one the store was made from.
    """
    projector = Projector(nc, store)
    await projector.check()
    history, queries = History(projector), Queries(projector)
    try:
        async with projector.running(), asyncio.TaskGroup() as tasks:
            archive = Archive(store, projector.history, retention) if retention else None
            archiving = tasks.create_task(archive.run()) if archive else None
            try:
                await queries.start(tasks)
                service = await serve(nc, QUERY_NAME, __version__, history.endpoints(), tasks)
                yield projector
                if nc.is_connected:
                    await service.stop()
            finally:
                if archiving is not None:
                    archiving.cancel()
                await queries.close()
    finally:
        history.close()


async def _either(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m store.main", description="Project the log into the history.")
    parser.add_argument("--url", required=True, help="where NATS answers")
    parser.add_argument("--home", required=True, type=Path, help="folder of the history's files")
    parser.add_argument("--archive-after", type=int, default=7, help="days after which events and logs are archived")
    parser.add_argument("--keep-logs", type=int, default=30, help="days after which logs are deleted")
    parser.add_argument("--keep-events", type=int, help="days after which archived events are deleted")
    parser.add_argument("--verbose", action="store_true", help="say more on stderr")
    return parser.parse_args()


def main() -> int:
    """Run the process; the exit code."""
    options = _options()
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    token = os.environ.get("HELMR_API_KEY")
    tune_interpreter()
    keep_buffers()
    os.nice(NICENESS)
    try:
        kept = Retention(hot=options.archive_after, logs=options.keep_logs, events=options.keep_events)
        asyncio.run(run(options.url, options.home, token=token, retention=kept))
    except Exception as error:  # noqa: BLE001  # the last stop: say why, and end
        return _report(cause(error))
    return 0


def _report(error: BaseException) -> int:
    if isinstance(error, duckdb.Error) and files.disk_full(error):
        error = Unavailable(
            f"the disk is full: {error}",
            hint="make room in the home folder: `helmr server` starts the projector again by itself",
        )
    if not isinstance(error, HelmrError):
        log.error("the history stopped", exc_info=error)
        return 1
    hint = f"\nhint: {error.hint}" if error.hint else ""
    print(f"error: {error.message}{hint}", file=sys.stderr)  # noqa: T201
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
