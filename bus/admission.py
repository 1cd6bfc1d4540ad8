"""Admits held runs: as many as the limits of their queues and the room in their lanes allow, and in fair turns.

A run of a limited queue is admitted in two appends: the queue gives it a slot, then the run is queued in its lane. Only the
first decides, by compare-and-set: with several control processes, and after the death of any of them between the two, the
limit holds. Whoever finds a slot given to a run that is held still carries it out; whoever finds one whose run has ended,
waits or will be retried gives it back. A process that lost such an append leaves the pool to the winner for a moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable

import nats.errors

from bus.deployments import Deployments
from bus.held import HeldRuns, PoolKey
from bus.lane_loads import LaneLoads
from bus.live import LiveRun, LiveRuns, QueueKey
from bus.log import QUEUE, Log, Position
from bus.presence import Presence
from bus.queueing import Applicant, admit, is_group
from helmr import events
from helmr.errors import Conflict, HelmrError, NotFound
from helmr.events import Grant, Limit, QueueEvent
from helmr.reducers import queue as rules
from helmr.reducers import run as run_rules
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Runs admitted in one round, at most: those who arrive meanwhile have their turn in the next.
_ROUND = 256
#: Appends under way at the same time.
_APPENDS = 64
#: Seconds a pool is left to another control process that was quicker.
_YIELD = 0.5
#: Seconds after which a slot that was given and not used is somebody's unfinished business.
_UNFINISHED = 1.0
#: Seconds between looks while somebody is held: workers come and go, deployments change, others leave things unfinished.
_LOOK = 2.0
_RETRY_DELAY = 0.5


class _Turn:
    """What one round does to one pool."""

    def __init__(self) -> None:
        self.admit: list[LiveRun] = []  #: to be given a slot (in a queue's pool) and to be queued
        self.finish: list[LiveRun] = []  #: have their slot already
        self.release: dict[str, int] = {}
        self.others: list[str | None] = []
        self.bounds = rules.Limits()
        self.room: rules.Room | None = None
        self.position: Position[QueueEvent] = Position(0, None)


class Admission:
    """Decides who is held (:meth:`gate`), and lets them in; run :meth:`run` in a task of its own."""

    def __init__(
        self, log: Log, live: LiveRuns, ready: asyncio.Event, deployments: Deployments, presence: Presence
    ) -> None:
        self.log = log
        self.live = live
        self.held = HeldRuns(live)
        self.lanes = LaneLoads(presence)
        self._ready = ready
        self._deployments = deployments
        self._presence = presence
        self._executing: defaultdict[QueueKey, dict[str, str | None]] = defaultdict(dict)
        self._deferred: dict[PoolKey, float] = {}
        self._first = 0
        self._unfinished = False
        self._wake = asyncio.Event()
        self._appends = asyncio.Semaphore(_APPENDS)
        live.listen(self._heed)
        live.listen_to_queues(lambda _: self._wake.set())

    def gate(self, scope: Scope, run_id: str, run: Applicant, lane: str) -> Limit | None:
        """What holds a run that is about to be queued: see :data:`bus.queueing.Gate`."""
        if run.queue is not None and self.limits(scope, run.queue, run.deployment_id).bind(run.concurrency_key):
            return "queue"
        if self.lanes.room(lane) <= 0 or len(self.held.pool(lane)) > 0:
            return "backlog"
        self.lanes.send(run_id, lane)
        return None

    def limits(self, scope: Scope, queue: str, deployment_id: str | None) -> rules.Limits:
        """The limits of a queue that count now."""
        return self._deployments.limits(scope, queue, deployment_id)

    def executing(self, queue: QueueKey) -> dict[str, str | None]:
        """The runs of a queue that were let into a lane and have not left since, with their concurrency keys."""
        return dict(self._executing.get(queue, {}))

    def _heed(self, before: LiveRun | None, after: LiveRun | None) -> None:
        self.lanes.note(before, after)
        self.held.note(before, after)
        if (run := after or before) is not None and run.state.queue is not None:
            self._note_executing((run.scope, run.state.queue), run, executes=after is not None and _executes(after))
            self._wake.set()
        elif len(self.held):
            self._wake.set()

    def _note_executing(self, queue: QueueKey, run: LiveRun, *, executes: bool) -> None:
        if executes:
            self._executing[queue][run.id] = run.state.concurrency_key
        else:
            self._executing[queue].pop(run.id, None)
            if not self._executing[queue]:
                del self._executing[queue]

    async def run(self) -> None:
        """Admit for ever."""
        await self._ready.wait()
        known = False
        while True:
            try:
                if not known:
                    await self._learn(self._queues())
                    await self._tidy()
                    known = True
                await self._round()
            except (HelmrError, nats.errors.Error) as error:
                log.info("admission: starting over: %s", error)
                await asyncio.sleep(_RETRY_DELAY)  # the server is away
                continue
            await self._rest()

    async def _rest(self) -> None:
        limit = _YIELD if self._deferred else _LOOK if len(self.held) or self._unfinished else None
        try:
            async with asyncio.timeout(limit):
                await self._wake.wait()
        except TimeoutError:
            return

    def _queues(self) -> set[QueueKey]:
        named = {(run.scope, run.state.queue) for run in self.live if run.state.queue is not None}
        return named | set(self._deployments.queues())

    async def _learn(self, queues: Iterable[QueueKey]) -> None:
        """Read who has slots: the events may be older than anything that was followed."""
        for queue in queues:
            self.live.put_queue(queue, await self.log.last(QUEUE, *queue))

    async def _tidy(self) -> None:
        """Delete the events that the latest one of each queue made superfluous, and whose writer died before doing so."""
        for scope, name in self.live.queues():
            last = self.live.queue((scope, name)).seq
            for seq in await self.log.sequences(QUEUE, scope, name, before=last):
                await self.log.delete(seq)

    async def _round(self) -> None:
        self._wake.clear()
        turns = self._plan()
        if not turns:
            return
        taken = (self._take_turn(pool, turn) for pool, turn in turns.items())
        for error in await asyncio.gather(*taken, return_exceptions=True):
            if error is not None:
                raise error
        if sum(len(turn.admit) for turn in turns.values()) >= _ROUND:
            self._wake.set()

    def _plan(self) -> dict[PoolKey, _Turn]:
        """Decide without waiting for anything, so that the decision is of one moment."""
        now = asyncio.get_running_loop().time()
        self._deferred = {pool: until for pool, until in self._deferred.items() if until > now}
        self._unfinished = False
        turns: dict[PoolKey, _Turn] = {}
        for pool in {*self.held.pools(), *self.live.held_queues()} - self._deferred.keys():
            turns[pool] = self._survey(pool) if isinstance(pool, tuple) else _Turn()
        self._deal(turns)
        return {pool: turn for pool, turn in turns.items() if turn.admit or turn.finish or turn.release}

    def _survey(self, queue: QueueKey) -> _Turn:
        """Who has left, whose admission is unfinished, and what room there is."""
        turn = _Turn()
        turn.position = self.live.queue(queue)
        turn.bounds = self.limits(*queue, self._latest_deployment(queue))
        holders = turn.position.state.holders if turn.position.state else {}
        turn.others = [key for run_id, key in self._executing.get(queue, {}).items() if run_id not in holders]
        turn.room = rules.Room(turn.position.state, turn.bounds, others=turn.others)
        now = events.now()
        for run_id, grant in holders.items():
            run = self.live.get(run_id)
            if self._has_left(run, grant):
                turn.release[run_id] = grant.held
                turn.room.take(grant.key, -1)
            elif run is not None and run.state.hold is not None and run.state.hold.cursor == grant.held:
                self.held.remove(queue, run_id)
                self._unfinished = True
                if (now - grant.at).total_seconds() > _UNFINISHED:
                    turn.finish.append(run)
        return turn

    def _has_left(self, run: LiveRun | None, grant: Grant) -> bool:
        if run is None:  # it has ended, unless we have not even heard of it
            return self.live.position >= grant.seq
        return run_rules.has_left(run.state, held=grant.held)

    def _latest_deployment(self, queue: QueueKey) -> str | None:
        """The deployment of the run that waits longest: its word counts where the current one is silent."""
        oldest = self.held.pool(queue).oldest()
        run = self.live.get(oldest[1]) if oldest else None
        return run.state.deployment_id if run else None

    def _deal(self, turns: dict[PoolKey, _Turn]) -> None:
        """One run for each pool in turn, until nothing fits; another pool is the first every time."""
        order = list(turns)
        self._first += 1
        order = order[self._first % max(len(order), 1) :] + order[: self._first % max(len(order), 1)]
        left = _ROUND
        while order and left > 0:
            order = [pool for pool in order if self._deal_one(pool, turns[pool])]
            left -= len(order)

    def _deal_one(self, pool: PoolKey, turn: _Turn) -> bool:
        def fits(run: LiveRun) -> bool:
            lane = run.state.lane or ""
            own = turn.room is None or turn.room.fits(run.state.concurrency_key)
            # The lane of a worker or host that is gone fills up; the queue's other runs shall not wait behind that.
            return own and (self.lanes.room(lane) > 0 or (turn.room is not None and not is_group(lane)))

        run = self.held.pick(pool, fits)
        if run is None:
            return False
        turn.admit.append(run)
        self.lanes.send(run.id, run.state.lane or "")
        if turn.room is not None:
            turn.room.take(run.state.concurrency_key)
        return True

    async def _take_turn(self, pool: PoolKey, turn: _Turn) -> None:
        try:
            if isinstance(pool, tuple):
                await self._give_slots(pool, turn)
        except BaseException as error:
            self._put_back(turn.admit)
            if not isinstance(error, Conflict):
                raise
            await self._yield(pool)
        else:
            done = await asyncio.gather(*(self._dispatch(pool, run) for run in turn.finish + turn.admit))
            if not all(done):
                await self._yield(pool)

    async def _give_slots(self, queue: QueueKey, turn: _Turn) -> None:
        """The append that decides.

        Raises:
            Superseded: another control process changed the queue; nothing was given.
        """
        wanted = {run.id: _grant(run) for run in turn.admit}
        draft = rules.change(turn.position.state, turn.bounds, admit=wanted, release=turn.release, others=turn.others)
        if draft is not None:
            self.live.put_queue(queue, await self.log.append(QUEUE, *queue, turn.position, draft))
            if turn.position.seq:  # the new event says all that this one did
                await self.log.delete(turn.position.seq)

    async def _dispatch(self, pool: PoolKey, run: LiveRun) -> bool:
        """Queue one run in its lane; whether there was no need to because it is gone, or it was us who did."""
        alive, hold = set(self._presence.alive()), run.state.hold
        if hold is None:
            return True
        async with self._appends:
            try:
                return await admit(
                    self.log, run.scope, run.id, held=hold.cursor, lane=run.state.lane or "", alive=alive
                )
            except (Conflict, NotFound) as error:
                log.debug("run %s: %s", run.id, error)
                self.lanes.forget(run.id)
                return True
            except BaseException:
                if isinstance(pool, str):  # one with a slot is found by that
                    self._put_back([run])
                raise

    def _put_back(self, runs: Iterable[LiveRun]) -> None:
        for run in runs:
            self.lanes.forget(run.id)
            present = self.live.get(run.id)
            if present is not None and present.state.hold == run.state.hold:
                self.held.put(present)

    async def _yield(self, pool: PoolKey) -> None:
        self._deferred[pool] = asyncio.get_running_loop().time() + _YIELD
        if isinstance(pool, tuple):
            await self._learn([pool])


def _executes(run: LiveRun) -> bool:
    return run.state.status == "running" or run.in_lane is not None


def _grant(run: LiveRun) -> Grant:
    held = run.state.hold.cursor if run.state.hold else 0
    return Grant(held=held, seq=run.seq, key=run.state.concurrency_key, at=events.now())
