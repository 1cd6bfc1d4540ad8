"""Appends the events of one run under its lease, in order; the place where a lost lease is noticed.

From the moment it holds the lease, a worker expects its own last sequence on every append. When somebody else appended in
between, it reads the run again: if the lease is still its own (a cancel request came in, say), it goes on from there; if not,
it is fenced, and must end what it executes without another word.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from bus import topology
from bus.bookmark import Frame
from bus.log import RUN, Log, Position
from bus.stored import Superseded
from helmr.errors import Unavailable
from helmr.events import Draft, Lease, RunEvent, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope

#: Seconds after which what was known of a lease or a claim is looked at again before it is acted upon.
STALE = topology.HEARTBEAT
#: Seconds between looks when the server does not answer.
_RETRY_DELAY = 0.5
#: Events waiting to be appended before a writer has to wait.
_MAX_WAITING = 256


class Fenced(Exception):
    """The lease is somebody else's, or the run has ended: stop, and stay silent."""


class RunJournal:
    """The writer of one leased run; run :meth:`run` in a task of its own."""

    def __init__(
        self,
        log: Log,
        scope: Scope,
        position: Position[RunEvent],
        on_state: Callable[[RunState], None],
        *,
        appended: Callable[[], None] = lambda: None,
    ) -> None:
        if position.event is None or position.event.state.lease is None:
            raise Fenced("there is no lease to write under")
        self._log = log
        self._scope = scope
        self._position = position
        self._lease = position.event.state.lease
        self._on_state = on_state
        self._tell = appended
        #: What is put from now on comes from this frame of the process that was started under that lease.
        self.frame = Frame(0, 0)
        self._waiting: deque[tuple[Draft, Frame]] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._appending: Frame | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock = asyncio.Lock()
        #: Whether the lease has ended with our last event: the run waits.
        self.released = False
        self._confirmed = asyncio.get_running_loop().time()

    @property
    def state(self) -> RunState:
        """The run's state as of our last append or read."""
        state: RunState = self._position.state
        return state

    @property
    def lease(self) -> Lease:
        """The lease that we write under."""
        return self._lease

    @property
    def executed_before(self) -> bool:
        """Whether an earlier lease may have had something of the run executed."""
        return self.state.dispatch_attempt > 1 or (self.state.attempt or 1) > 1

    @property
    def oldest(self) -> int | None:
        """The first frame of the process of which something is not appended yet; None: there is none."""
        if self._appending is not None:
            return self._appending.number
        return self._waiting[0][1].number if self._waiting else None

    async def put(self, draft: Draft) -> None:
        """Have an event appended soon, after those put before it; waits while too many are waiting."""
        if draft.kind == "metadata" and self._waiting and self._waiting[-1][0].kind == "metadata":
            self._waiting.pop()  # each holds the whole document: the later one says it all
        self._waiting.append((draft, self.frame))
        self._idle.clear()
        self._changed.set()
        if len(self._waiting) >= _MAX_WAITING:
            self._room.clear()
        await self._room.wait()

    async def run(self) -> None:
        """Append what is put, until cancelled.

        Raises:
            Fenced: the lease is lost.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._waiting:
                draft, self._appending = self._waiting.popleft()
                await self._append(lambda _, draft=draft: draft, self._appending)  # type: ignore[misc]
                self._room.set()
                self._appending = None
                self._tell()
            self._idle.set()

    async def flush(self) -> None:
        """Wait until everything put has been appended."""
        await self._idle.wait()

    async def append(self, decide: Callable[[RunState], Draft]) -> RunState:
        """Append one event now; ``decide`` is asked again when something came in between.

        Raises:
            Fenced: the lease is lost.
        """
        return await self._append(decide, self.frame)

    async def _append(self, decide: Callable[[RunState], Draft], frame: Frame) -> RunState:
        async with self._lock:
            while True:
                try:
                    self._position = await self._log.append(
                        RUN, self._scope, self.state.id, self._position, decide(self.state), headers=frame.headers()
                    )
                except Superseded:
                    await self._reread()
                else:
                    self._confirmed = asyncio.get_running_loop().time()
                    return self.state

    def release(self) -> None:
        """The lease has ended with the last event: the run waits."""
        self.released = True

    async def confirm(self) -> None:
        """Make sure, unless that is fresh in mind, that the lease is ours: before something begins that cannot be undone.

        Whoever was stopped for a while has the world as it was, and would execute what others have executed meanwhile. While
        the server is away this waits, because nobody else can take the run then.

        Raises:
            Fenced: the lease is lost.
        """
        stale = asyncio.get_running_loop().time() - self._confirmed > STALE
        while stale:
            try:
                await self.check()
            except Unavailable:
                await asyncio.sleep(_RETRY_DELAY)  # the server is away
            else:
                stale = False

    async def check(self) -> None:
        """Read the run, in case a message about it was missed.

        Raises:
            Fenced: the lease is lost.
        """
        async with self._lock:
            if not self.released:
                await self._reread()

    async def _reread(self) -> None:
        position = await self._log.last(RUN, self._scope, self.state.id)
        state: RunState | None = position.state
        if state is None or not rules.holds(state, worker=self._lease.worker, cursor=self._lease.cursor):
            raise Fenced(f"run {self.state.id} is no longer leased to {self._lease.worker}")
        self._position = position
        self._confirmed = asyncio.get_running_loop().time()
        self._on_state(state)
