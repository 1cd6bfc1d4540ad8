"""Runs: get, list, wait, cancel, follow their events and logs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from helmr import chunks, events, subjects
from helmr.chunks import LogChunk
from helmr.client.logs import Assembler
from helmr.client.pages import newest
from helmr.client.wire import PATIENCE, Wire
from helmr.durations import Duration, seconds
from helmr.errors import NotFound, RunFailed, TimedOut
from helmr.events import TERMINAL
from helmr.explanation import Explanation, ended
from helmr.models import ELSEWHERE, Event, LiveRun, LogMatch, Run

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from helmr.client.aio import AsyncClient

#: Seconds without a live message after which a follower asks, in case one was lost with a connection.
_LOOK_AGAIN = 5.0
#: Events asked for at a time.
_PAGE = 500


class _EventsPage(msgspec.Struct):
    events: list[Event]
    terminal: bool


class _SearchPage(msgspec.Struct):
    matches: list[LogMatch]
    next: str | None


class _LivePage(msgspec.Struct):
    runs: list[LiveRun]
    next: str | None


class _Page(msgspec.Struct):
    data: bytes
    size: int


class _LogsPage(msgspec.Struct):
    chunks: list[LogChunk]
    more: bool


class Runs:
    """``client.runs``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.events = Events(client)

    @property
    def _wire(self) -> Wire:
        return self._client.wire

    async def get(self, run: str | Run | RunHandle) -> Run:
        """One run, by id, unique prefix or ``@last``; from the log, or from the history once the log has let it go.

        Raises:
            NotFound: there is no such run.
        """
        found = await self._get(await self._client.resolve("run", run_id_of(run)))
        if found.output_artifact is not None:
            output = await self._large(found.id, "output", found.output)
            found = msgspec.structs.replace(found, output=output)
        if isinstance(found.payload, dict) and found.payload.keys() == {ELSEWHERE}:
            payload = await self._large(found.id, "payload", found.payload)
            found = msgspec.structs.replace(found, payload=payload)
        return found

    async def _large(self, run_id: str, verb: str, otherwise: Any) -> Any:
        """A value that no event could carry, page by page; once it is gone, what there is ``otherwise``."""
        body = b""
        try:
            while True:
                page = await self._wire.call("run", verb, {"id": run_id, "offset": len(body)}, _Page)
                body += page.data
                if len(body) >= page.size:
                    return await asyncio.to_thread(msgspec.json.decode, body)
        except NotFound:
            return otherwise

    async def _get(self, run_id: str, *, patience: float = 0.0) -> Run:
        try:
            return await self._wire.call("run", "get", {"id": run_id}, Run, patience=patience)
        except NotFound:
            return await self._wire.call("history", "run", {"id": run_id, "fresh": True}, Run, patience=patience)

    async def list(
        self,
        *,
        status: str | None = None,
        task: str | None = None,
        session: str | None = None,
        since: Duration | None = None,
        limit: int = 50,
    ) -> list[Run]:
        """Runs, newest first."""
        body: dict[str, Any] = {"status": status, "task": task, "session": session}
        if session is not None:
            body["session"] = await self._client.resolve("session", session)
        if since is not None:
            body["since"] = seconds(since)
        return await newest(self._wire, "runs", body, Run, limit)

    async def live(self) -> Sequence[LiveRun]:
        """All runs that have not ended, in the order of their ids; from control, without the history."""
        found: list[LiveRun] = []
        after: str | None = ""
        while after is not None:
            page = await self._wire.call("run", "live", {"after": after}, _LivePage)
            found += page.runs
            after = page.next
        return found

    async def wait(self, run: str | Run | RunHandle, *, timeout: Duration | None = None) -> Run:  # noqa: ASYNC109
        """The run once it has ended, however it ended.

        Raises:
            TimedOut: it is still going on after ``timeout``; nothing happens to it.
        """
        run_id = await self._client.resolve("run", run_id_of(run))
        limit = None if timeout is None else seconds(timeout)
        try:
            async with asyncio.timeout(limit):
                async for _ in self.events.subscribe(run_id):
                    pass
        except TimeoutError:
            raise TimedOut(f"run {run_id} has not ended within {limit:g} s", hint="it goes on") from None
        return await self.get(run_id)

    async def explain(self, run: str | Run | RunHandle) -> Explanation:
        """What a run is doing or why it is not, since when, and what would change that: in one paragraph, and as facts."""
        run_id = await self._client.resolve("run", run_id_of(run))
        try:
            return await self._wire.call("run", "explain", {"id": run_id}, Explanation)
        except NotFound:
            return ended(await self._get(run_id), events.now())

    async def search(
        self,
        pattern: str,
        *,
        regex: bool = False,
        ignore_case: bool = False,
        since: Duration = "24h",
        task: str | None = None,
        run: str | Run | RunHandle | None = None,
        stream: str | None = None,
        context: int = 0,
    ) -> AsyncIterator[LogMatch]:
        """Lines in the logs of all runs that contain ``pattern``, oldest first, as they are found.

        ``regex``: it is a regular expression in the syntax of RE2. ``since``: how far back to look. ``context``: how many lines
        around each to bring along, at most 50. A match across two chunks of output is not found.

        Raises:
            UsageError: the pattern is empty, has a line break, or is no regular expression.
        """
        body: dict[str, Any] = {"pattern": pattern, "regex": regex, "ignore_case": ignore_case, "task": task}
        body |= {"since": seconds(since), "stream": stream, "context": context, "fresh": True}
        body["run_id"] = await self._client.resolve("run", run_id_of(run)) if run is not None else None
        while True:
            page = await self._wire.call("history", "search", body, _SearchPage)
            for match in page.matches:
                yield match
            if page.next is None:
                return
            body |= {"after": page.next, "fresh": False}

    async def cancel(self, run: str | Run | RunHandle, *, reason: str | None = None, force: bool = False) -> Run:
        """Ask for the end of a run; one that nothing executes ends at once."""
        run_id = await self._client.resolve("run", run_id_of(run))
        return await self._wire.call("run", "cancel", {"id": run_id, "reason": reason, "force": force}, Run)

    async def logs(
        self,
        run: str | Run | RunHandle,
        *,
        follow: bool = False,
        stream: str | None = None,
        attempt: int | None = None,
    ) -> AsyncIterator[LogChunk]:
        """What the run has written, in the order it was stored; with ``follow`` until the run ends."""
        run_id = await self._client.resolve("run", run_id_of(run))
        stored = _StoredLogs(self._wire, run_id, stream=stream, attempt=attempt, patient=follow)
        assembler = Assembler()
        if not follow:
            async for chunk in stored.read():
                for fresh in assembler.take(chunk):
                    yield fresh
            for fresh in assembler.rest():
                yield fresh
            return
        async for chunk in self._follow_logs(run_id, stored, assembler):
            yield chunk

    async def _follow_logs(self, run_id: str, stored: _StoredLogs, assembler: Assembler) -> AsyncIterator[LogChunk]:
        live = _Inbox()
        scope = self._wire.scope
        wanted = subjects.log(
            scope, run_id, stored.attempt if stored.attempt is not None else "*", stored.stream or "*"
        )
        terminal = subjects.live(scope, "run", run_id, "*")
        async with self._wire.subscribe(wanted, live.put), self._wire.subscribe(terminal, live.put):
            ended = await self._ended(run_id)
            reconnects = self._wire.reconnects
            while True:
                async for chunk in stored.read():
                    for fresh in assembler.take(chunk):
                        yield fresh
                if ended:
                    for fresh in assembler.rest():
                        yield fresh
                    return
                async for chunk in live.chunks():
                    if not assembler.fits(chunk) or self._wire.reconnects != reconnects:
                        break
                    for fresh in assembler.take(chunk):
                        yield fresh
                ended = live.ended or await self._ended(run_id)
                reconnects = self._wire.reconnects

    async def _ended(self, run_id: str) -> bool:
        return (await self._get(run_id, patience=PATIENCE)).status in TERMINAL

    def handle(self, run: Run) -> RunHandle:
        """A handle for a run record."""
        return RunHandle(self, run)


class _Inbox:
    """Live messages of one run: log chunks, until its terminal event."""

    def __init__(self) -> None:
        self._waiting: deque[Msg] = deque()
        self._arrived = asyncio.Event()
        self.ended = False

    def put(self, msg: Msg) -> None:
        self._waiting.append(msg)
        self._arrived.set()

    async def chunks(self) -> AsyncIterator[LogChunk]:
        """Log chunks as they arrive; returns at the terminal event, or when nothing has come for a while."""
        while not self.ended:
            self._arrived.clear()
            while self._waiting:
                msg = self._waiting.popleft()
                if msg.subject.rpartition(".")[2] in TERMINAL:
                    self.ended = True
                elif msg.headers and chunks.HEADER_OFFSET in msg.headers:
                    yield chunks.parse(msg.subject, msg.headers, msg.data)
            if self.ended:
                return
            try:
                async with asyncio.timeout(_LOOK_AGAIN):
                    await self._arrived.wait()
            except TimeoutError:
                return


class _StoredLogs:
    """Pages through the stored chunks of a run, going on where it stopped."""

    def __init__(self, wire: Wire, run_id: str, *, stream: str | None, attempt: int | None, patient: bool) -> None:
        self._wire = wire
        self._run_id = run_id
        self.stream = stream
        self.attempt = attempt
        #: A follower puts up with restarts; whoever only reads wants to know at once.
        self._patience = PATIENCE if patient else 0.0
        self._after = 0

    async def read(self) -> AsyncIterator[LogChunk]:
        while True:
            body = {"id": self._run_id, "after": self._after, "stream": self.stream, "attempt": self.attempt}
            page = await self._page(body)
            for chunk in page.chunks:
                self._after = max(self._after, chunk.seq)
                yield chunk
            if not page.more:
                return

    async def _page(self, body: dict[str, Any]) -> _LogsPage:
        try:
            return await self._wire.call("run", "logs", body, _LogsPage, patience=self._patience)
        except NotFound:
            body["run_id"] = body.pop("id")
            return await self._wire.call(
                "history", "logs", body | {"after_seq": body["after"]}, _LogsPage, patience=self._patience
            )


class Events:
    """``client.runs.events``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, run: str | Run | RunHandle, *, after: int = 0, limit: int = 500) -> list[Event]:
        """Stored events with a cursor beyond ``after``, oldest first."""
        run_id = await self._client.resolve("run", run_id_of(run))
        return (await self._page(run_id, after, limit)).events

    async def subscribe(self, run: str | Run | RunHandle, *, after: int = 0) -> AsyncIterator[Event]:
        """The run's events, stored ones first and then live, without a gap, until the terminal one."""
        run_id = await self._client.resolve("run", run_id_of(run))
        wire = self._client.wire
        live: asyncio.Queue[Msg] = asyncio.Queue()
        async with wire.subscribe(subjects.live(wire.scope, "run", run_id), live.put_nowait):
            while True:
                page = await self._page(run_id, after, _PAGE, patience=PATIENCE)
                for event in page.events:
                    after = event.cursor
                    yield event
                if page.terminal:
                    return
                if len(page.events) == _PAGE:
                    continue
                async for event in _successors(live, after):
                    after = event.cursor
                    yield event
                    if event.kind in TERMINAL:
                        return

    async def _page(self, run_id: str, after: int, limit: int, *, patience: float = 0.0) -> _EventsPage:
        wire = self._client.wire
        try:
            request = {"id": run_id, "after": after, "limit": limit}
            return await wire.call("run", "events", request, _EventsPage, patience=patience)
        except NotFound:
            body = {"run_id": run_id, "after": after, "limit": limit, "fresh": True}
            return await wire.call("history", "events", body, _EventsPage, patience=patience)


async def _successors(live: asyncio.Queue[Msg], after: int) -> AsyncIterator[Event]:
    """Live events for as long as each follows the one before; ends at a gap, and when nothing has come for a while."""
    while True:
        try:
            async with asyncio.timeout(_LOOK_AGAIN):
                msg = await live.get()
        except TimeoutError:
            return
        event = msgspec.json.decode(msg.data, type=Event)
        if event.cursor > after + 1:
            return
        if event.cursor == after + 1:
            after = event.cursor
            yield event


class RunHandle:
    """A run and what can be done with it; ``record`` is the run as it was when the handle was made."""

    def __init__(self, runs: Runs, record: Run) -> None:
        self._runs = runs
        self.record = record
        self.id = record.id

    def __repr__(self) -> str:
        return f"RunHandle({self.id!r})"

    async def wait(self, *, timeout: Duration | None = None) -> Run:  # noqa: ASYNC109
        """See :meth:`Runs.wait`."""
        return await self._runs.wait(self.id, timeout=timeout)

    async def result(self, *, timeout: Duration | None = None) -> Any:  # noqa: ASYNC109
        """The run's output, once it has succeeded.

        Raises:
            RunFailed: it ended otherwise.
        """
        return output_of(await self.wait(timeout=timeout))

    async def cancel(self, *, reason: str | None = None, force: bool = False) -> Run:
        """See :meth:`Runs.cancel`."""
        return await self._runs.cancel(self.id, reason=reason, force=force)

    def events(self, *, after: int = 0) -> AsyncIterator[Event]:
        """See :meth:`Events.subscribe`."""
        return self._runs.events.subscribe(self.id, after=after)

    def logs(self, *, follow: bool = True, stream: str | None = None) -> AsyncIterator[LogChunk]:
        """See :meth:`Runs.logs`."""
        return self._runs.logs(self.id, follow=follow, stream=stream)


def output_of(run: Run) -> Any:
    """The output of a run that succeeded.

    Raises:
        RunFailed: it ended otherwise.
    """
    if run.status == "succeeded":
        return run.output
    why = f": {run.failure.code}: {run.failure.message}" if run.failure else ""
    raise RunFailed(
        f"run {run.id} {run.status}{why}",
        hint=f"see `helmr run logs {run.id}`",
        details={"status": run.status, "failure": msgspec.to_builtins(run.failure)},
    )


def run_id_of(run: str | Run | RunHandle) -> str:
    """The id in whatever form a run was given."""
    return run if isinstance(run, str) else run.id
