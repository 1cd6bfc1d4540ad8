"""The runs that are held, each in the pool from which it will be admitted: that of its queue, or that of its lane."""

from __future__ import annotations

from collections.abc import Callable

from bus.live import LiveRun, LiveRuns, QueueKey
from helmr.reducers.fairness import FairOrder, rank

#: A queue with a limit, or a lane with a backlog.
PoolKey = QueueKey | str


def pool_of(run: LiveRun) -> PoolKey | None:
    """Where a run is held; None when it is not."""
    hold = run.state.hold
    if hold is None or run.state.lane is None:
        return None
    if hold.limit == "queue" and run.state.queue is not None:
        return (run.scope, run.state.queue)
    return run.state.lane


def group_of(run: LiveRun) -> str:
    """Whose turns a run takes part in: those of its concurrency key. Without one, in a lane that all share, its task's."""
    key = run.state.concurrency_key
    if isinstance(pool_of(run), tuple):
        return key or ""
    return f"{run.scope} key {key}" if key is not None else f"{run.scope} task {run.state.task_id}"


class HeldRuns:
    """All pools; :meth:`note` is told of every change of a live run."""

    def __init__(self, live: LiveRuns) -> None:
        self._live = live
        self._pools: dict[PoolKey, FairOrder] = {}

    def __len__(self) -> int:
        return sum(map(len, self._pools.values()))

    def note(self, before: LiveRun | None, after: LiveRun | None) -> None:
        """Put a run where it belongs."""
        was = pool_of(before) if before else None
        now = pool_of(after) if after else None
        if before is not None and was is not None and (was != now or after is None):
            self.remove(was, before.id)
        if after is not None and now is not None and (before is None or before.state.hold != after.state.hold):
            self.put(after)

    def put(self, run: LiveRun) -> None:
        """Let a held run wait, (again) if it was picked."""
        pool = pool_of(run)
        if pool is not None:
            order = rank(run.state.queued_at or run.at, run.state.priority, run.id)
            self._pools.setdefault(pool, FairOrder()).add(run.id, group_of(run), order)

    def remove(self, pool: PoolKey, run_id: str) -> None:
        """A run waits no more."""
        order = self._pools.get(pool)
        if order is not None:
            order.remove(run_id)
            self._tidy(pool)

    def pick(self, pool: PoolKey, fits: Callable[[LiveRun], bool]) -> LiveRun | None:
        """Take the next run of a pool, of those that fit."""

        def asks(run_id: str) -> bool:
            run = self._live.get(run_id)
            return run is not None and fits(run)

        run_id = self.pool(pool).pick(asks)
        self._tidy(pool)
        return None if run_id is None else self._live.get(run_id)

    def _tidy(self, pool: PoolKey) -> None:
        if pool in self._pools and not len(self._pools[pool]):
            del self._pools[pool]

    def pool(self, key: PoolKey) -> FairOrder:
        """The runs of one pool, in the order of their admission."""
        return self._pools.get(key) or FairOrder()

    def pools(self) -> list[PoolKey]:
        """The pools in which somebody waits."""
        return list(self._pools)

    def runs(self, key: PoolKey) -> list[LiveRun]:
        """The runs of one pool, in no order."""
        return [run for run_id in self.pool(key) if (run := self._live.get(run_id)) is not None]
