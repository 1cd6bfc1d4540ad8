"""Runs users' SQL in sandboxed child processes (:mod:`store.sandbox`), over copies of the files.

A child is ready before it is needed and is used again as long as it behaves; one that misses its deadline is killed. The child
that was used last comes first: it may have open what the next query is about.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bus import topology
from helmr.errors import HelmrError, TimedOut, from_dict
from helmr.subjects import Scope
from store.exposure import Source
from store.projector import FRESHNESS_DEADLINE, Projector
from store.question import MAX_BYTES, QueryRequest, Summary
from store.sandbox import DATA, ERROR, HEADER, REQUEST, CheckedReply, Task
from store.snapshot import Snapshots

if TYPE_CHECKING:
    from store.history_store import Send
    from store.sinks import Store

#: Queries that run at the same time; the others wait, until their deadline.
CONCURRENT = 2
#: Seconds that a copy may be old for who does not ask for a fresh answer: copying and opening costs more than most queries.
STALE = 10.0
#: Seconds beyond its deadline after which a query that cannot be interrupted is killed.
_GRACE = 0.3


async def _nowhere(_part: bytes) -> None:
    """A check has no rows."""


class Child:
    """One sandbox process; not to be used by two at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.busy = False

    @classmethod
    async def start(cls) -> Child:
        """Start a process, with an empty environment and only the interpreter's own search path."""
        root = Path(__file__).parent.parent
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from store.sandbox import main; main()"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-X", "utf8", "-c", code),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            env={},
        )
        return cls(process)

    @property
    def usable(self) -> bool:
        """Whether the process is there and between two tasks."""
        return self.process.returncode is None and not self.busy

    async def ask(self, task: Task, send: Send) -> bytes:
        """Give the process a task, pass its data on, and return the body of the frame that ends the answer.

        Raises:
            EOFError: the process died.
            TimeoutError: the query was interrupted.
            HelmrError: what the process reports.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise EOFError
        self.busy = True
        body = msgspec.json.encode(task)
        try:
            self.process.stdin.write(HEADER.pack(len(body), REQUEST) + body)
            await self.process.stdin.drain()
            while True:
                length, kind = HEADER.unpack(await self.process.stdout.readexactly(HEADER.size))
                frame = await self.process.stdout.readexactly(length)
                if kind != DATA:
                    break
                await send(frame)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EOFError from error
        self.busy = False
        if kind == ERROR:
            raise _told(frame)
        return frame

    async def kill(self) -> None:
        """End the process at once."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class Sandboxes:
    """The children, and the copies they read."""

    def __init__(self, store: Store, projector: Projector) -> None:
        self.projector = projector
        self.store = store
        self.snapshots = Snapshots(store.home.snapshots)
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._idle: list[Child] = []
        self._children: set[Child] = set()

    async def start(self) -> None:
        """Have a child ready."""
        self._idle.append(await self._start())

    async def close(self) -> None:
        """End what is running; who waits for it is told so."""
        while self._children:
            await self._children.pop().kill()
        self.snapshots.close()

    async def _start(self) -> Child:
        child = await Child.start()
        self._children.add(child)
        return child

    async def _end(self, child: Child) -> None:
        self._children.discard(child)
        await child.kill()

    async def run(self, scope: Scope, request: QueryRequest, send: Send) -> Summary:
        """Run a query; ``send`` gets the result in parts of at most half a megabyte.

        Raises:
            UsageError: the query is not possible.
            TimedOut: it did not end in time, waiting for others included.
            HelmrError: it needs too much memory.
        """
        seconds, rows = request.limits()
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise TimedOut(f"other queries took all of the {seconds:g} s", hint="ask again") from None
        try:
            async with self._child() as child, asyncio.timeout_at(deadline + _GRACE):
                task = await self._check(child, scope, request, rows)
                return await self._execute(child, task, deadline, send, age=0.0 if request.fresh else STALE)
        except TimeoutError:
            raise _late(seconds) from None
        except EOFError:
            raise _died() from None
        finally:
            self._slots.release()

    @asynccontextmanager
    async def _child(self) -> AsyncIterator[Child]:
        """A child of one's own; one that is not at rest afterwards is killed."""
        child = self._idle.pop() if self._idle else await self._start()
        if not child.usable:
            await self._end(child)
            child = await self._start()
        try:
            yield child
        finally:
            if child.usable:
                self._idle.append(child)
            else:
                await asyncio.shield(self._end(child))

    async def _check(self, child: Child, scope: Scope, request: QueryRequest, rows: int) -> Task:
        parameters = {name.lower(): value for name, value in request.parameters.items()}
        answer = await child.ask(Task(verb="check", sql=request.sql, parameters=parameters), _nowhere)
        checked = msgspec.json.decode(answer, type=CheckedReply)
        if request.fresh:
            await self.projector.fresh(logs="logs" in checked.tables, timeout=FRESHNESS_DEADLINE)
        return Task(
            verb="run",
            sql=checked.sql,
            parameters=parameters,
            source=Source(
                project=scope.project,
                environment=scope.environment,
                archive=str(self.store.home.archive),
                logs=self.store.logs.days() if "logs" in checked.tables else [],
            ),
            format=request.format,
            max_rows=rows,
            max_bytes=MAX_BYTES,
        )

    async def _execute(self, child: Child, task: Task, deadline: float, send: Send, *, age: float) -> Summary:
        """Run a checked query over copies no older than ``age`` seconds, or of what is applied."""
        async with AsyncExitStack() as copies:
            history = await copies.enter_async_context(self._history(age))
            logs = [str(await copies.enter_async_context(self._log(day, age))) for day in task.source.logs]
            source = msgspec.structs.replace(task.source, history=str(history), logs=logs)
            left = max(deadline - asyncio.get_running_loop().time(), 0.05)
            ready = msgspec.structs.replace(task, source=source, seconds=left)
            answer = await child.ask(ready, send)
            return msgspec.json.decode(answer, type=Summary)

    def _history(self, age: float) -> Any:
        lane, source = self.projector.history, self.store.home.history
        return self.snapshots.use(source, mark=self.store.history.changes, age=age, rest=lane.commit)

    @asynccontextmanager
    async def _log(self, day: str, age: float) -> AsyncIterator[Path]:
        """The file of a day: finished and archived ones are read as they are, the present one as a copy."""
        lane, path = self.projector.logs, self.store.home.day(day)
        if day != self.store.logs.day:
            yield path if path.exists() else self.store.home.cold_day(day)
            return
        async with self.snapshots.use(path, mark=lane.applied[topology.LOGS], age=age, rest=lane.commit) as copy:
            yield copy


def _told(body: bytes) -> Exception:
    """What the child reports; that it was interrupted is our deadline's doing."""
    error = from_dict(msgspec.json.decode(body))
    return TimeoutError() if isinstance(error, TimedOut) else error


def _late(seconds: float) -> TimedOut:
    return TimedOut(f"the query took longer than {seconds:g} s", hint="ask for less, or raise --timeout")


def _died() -> HelmrError:
    return HelmrError(
        "the query was stopped: it needed too much memory or time", hint="select fewer rows, or aggregate"
    )
