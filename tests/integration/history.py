"""A running history for tests: in this process, or as the process that a server starts; and how to ask it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self

import duckdb
import nats.errors
from nats.aio.client import Client as Nats

from bus import topology
from helmr import subjects
from helmr.chunks import headers
from helmr.errors import TimedOut, from_dict
from helmr.subjects import Scope
from store.home import Home
from store.main import serving
from store.projector import Projector
from store.sinks import Store
from tests.lives import SCOPE, START, Published

#: A batch small enough that transactions follow one another quickly.
Rows = list[dict[str, Any]]


async def publish(nc: Nats, published: list[Published]) -> None:
    """Store messages, in order, and wait for the last one to be acknowledged."""
    for subject, body in published[:-1]:
        await nc.publish(subject, body)
    subject, body = published[-1]
    answer = json.loads((await nc.request(subject, body, timeout=10)).data)
    assert "error" not in answer, answer


async def publish_log(
    nc: Nats,
    run_id: str,
    body: bytes,
    *,
    offset: int = 0,
    attempt: int = 1,
    stream: str = "stdout",
    scope: Scope = SCOPE,
) -> None:
    """Store a log chunk."""
    fields = headers(offset=offset, dispatch=1, at=START)
    await nc.request(subjects.log(scope, run_id, attempt, stream), body, headers=fields, timeout=10)


@asynccontextmanager
async def projecting(
    nc: Nats, home: Path, *, wrap: Callable[[Store], None] = lambda _: None
) -> AsyncIterator[Projector]:
    """The projector over the history in ``home``, without services."""
    store = Store(Home(home))
    try:
        wrap(store)
        projector = Projector(nc, store)
        await projector.check()
        async with projector.running():
            yield projector
    finally:
        store.close()


@asynccontextmanager
async def history(nc: Nats, home: Path) -> AsyncIterator[Projector]:
    """The whole history with its services, in this process."""
    store = Store(Home(home))
    try:
        async with serving(nc, store) as projector:
            await nc.flush(timeout=30)  # other connections may ask, too, and their requests must not be quicker
            yield projector
    finally:
        store.close()


@contextmanager
def reading(store: Store, day: str | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A cursor over the history, or over the log of a day."""
    with store.cursor() as cursor:
        store.use(cursor, day)
        yield cursor


def store_of(projector: Projector) -> Store:
    """The files that a projector of these tests writes."""
    assert isinstance(projector.store, Store)
    return projector.store


def rows(projector: Projector, sql: str) -> Rows:
    """Rows of the history, read directly."""
    with reading(store_of(projector)) as cursor:
        found: Rows = cursor.sql(sql).to_arrow_table().to_pylist()
    return found


async def ask(nc: Nats, verb: str, body: dict[str, Any], *, scope: Scope = SCOPE) -> Any:
    """A canned question; raises the error that is answered."""
    msg = await nc.request(subjects.api(scope, "history", verb), json.dumps(body).encode(), timeout=10)
    answer = json.loads(msg.data)
    if msg.headers and "Nats-Service-Error" in msg.headers:
        raise from_dict(answer["error"])
    return answer


async def query(nc: Nats, sql: str, *, scope: Scope = SCOPE, **options: Any) -> tuple[bytes, dict[str, str]]:
    """A SQL question: the parts put together, and the headers of the last one; raises the error that is answered."""
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    try:
        request = json.dumps({"sql": sql, **options}).encode()
        await nc.publish(subjects.api(scope, "history", "query"), request, reply=inbox)
        body, expected = b"", 0
        while True:
            msg = await subscription.next_msg(timeout=30)
            fields = msg.headers or {}
            if "Nats-Service-Error" in fields:
                raise from_dict(json.loads(msg.data)["error"])
            assert int(fields["Helmr-Part"]) == expected
            assert len(msg.data) <= 512 * 1024
            expected += 1
            body += msg.data
            if "Helmr-End" in fields:
                assert int(fields["Helmr-End"]) == expected
                return body, fields
    finally:
        await subscription.unsubscribe()


async def table(nc: Nats, sql: str, *, scope: Scope = SCOPE, **options: Any) -> list[list[Any]]:
    """The rows of a SQL question, as JSON arrays."""
    body, _ = await query(nc, sql, scope=scope, format="json", **options)
    return [json.loads(line) for line in body.splitlines()[1:]]


class HistoryProcess:
    """The projector as a process of its own."""

    def __init__(self, url: str, home: Path) -> None:
        self.url = url
        self.home = home
        self.told = ""
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            await self.kill()

    async def start(self, *, wait: bool = True) -> None:
        """Start it; ``wait`` until it is ready (or has ended)."""
        self.told = ""
        self._ready.clear()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "store.main", "--url", self.url, "--home", str(self.home)),
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self._listening = asyncio.create_task(self._listen(self._process))
        if wait:
            await asyncio.wait_for(self._ready.wait(), 60)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self.told += line.decode()
            if "ready" in self.told:
                self._ready.set()
        self._ready.set()

    async def kill(self) -> None:
        """End it with SIGKILL."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self.ended()

    async def stop(self) -> int:
        """End it in good order; the exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        return await self.ended()

    async def ended(self) -> int:
        """Wait until it has ended; the exit code."""
        assert self._process is not None
        assert self._listening is not None
        code = await asyncio.wait_for(self._process.wait(), 60)
        await self._listening
        return code

    async def caught_up(self, nc: Nats, *, scope: Scope = SCOPE, patience: float = 60) -> None:
        """Wait until it has applied all there is."""
        async with asyncio.timeout(patience):
            while True:
                try:
                    await ask(nc, "status", {"fresh": True}, scope=scope)
                except (nats.errors.NoRespondersError, TimedOut):
                    await asyncio.sleep(0.05)
                else:
                    return


async def last_sequence(nc: Nats, stream: str = topology.RUNS) -> int:
    """The last sequence of a stream."""
    info = await nc.jetstream().stream_info(stream)
    return int(info.state.last_seq)
