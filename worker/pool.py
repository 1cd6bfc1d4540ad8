"""Machines started ahead: a workspace that begins empty adopts one, and is there in milliseconds.

Which kinds are worth keeping nobody says; what was asked for lately is what will be asked for next. A pool keeps as many of
each kind as were wanted within a minute, lets go of a kind that nobody wanted for a while, and never has more than its budget.

Most of them have the code of a deployment ready, imported: a run begins in a fork of it. Such a machine is for workspaces of
the same project and environment, and runs of the same deployment, alone. One more is bare: whoever comes with other code,
after a deploy, say, can have that, and puts the code in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Generic, NamedTuple, Protocol, TypeVar

from helmr.errors import HelmrError
from worker.engine import Limits, MachineSpec, Network, Provision
from worker.host import memory_is_short

log = logging.getLogger(__name__)

#: Seconds of demand that are kept in stock, and after which a kind that nobody wants is given up.
_WINDOW, _FORGET = 60.0, 600.0
#: Seconds that a pool lets pass after a demand before it starts containers: whoever has just got one shall have the processors
#: for a short run (some 20 ms), and perhaps the next one in it.
_CALM = 0.1


class Member(Protocol):
    """What a pool needs to know of a machine."""

    @property
    def lost(self) -> bool:
        """Whether it has ended by itself."""
        ...

    async def provide(self, provision: Provision) -> None:
        """Have what will be executed in it ready."""
        ...

    async def stop(self, grace: float = 2.0) -> None:
        """End it."""
        ...


M = TypeVar("M", bound=Member)


class Kind(NamedTuple):
    """What two machines must have in common for one to be as good as the other."""

    worker_id: str
    image: str
    mount_path: str
    limits: Limits
    network: Network
    provision: Provision | None = None

    @classmethod
    def of(cls, spec: MachineSpec) -> Kind:
        """The kind of the machine that is asked for."""
        return cls(spec.worker_id, spec.image, spec.mount_path, spec.limits, spec.network, spec.provision)

    def bare(self) -> Kind:
        """The same without anybody's code in it."""
        return self._replace(provision=None)

    def spec(self) -> MachineSpec:
        """How to make one that is nobody's yet."""
        return MachineSpec(workspace_id="", **self._asdict())


class Demand:
    """Which kinds were wanted when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wanted: dict[Kind, deque[float]] = {}

    def note(self, kind: Kind) -> None:
        """One is wanted now."""
        self._wanted.setdefault(kind, deque(maxlen=64)).append(self._clock())

    def forget(self, kind: Kind) -> None:
        """It cannot be had: start none until somebody wants one again."""
        self._wanted.pop(kind, None)

    def retire(self, owner: str, source: str) -> None:
        """Other code of ``owner`` than ``source`` will not be wanted any more, but what it ran in will."""
        for kind in [kind for kind in self._wanted if kind.provision is not None]:
            if kind.provision is not None and kind.provision.owner == owner and kind.provision.source != source:
                times = [*self._wanted.get(kind.bare(), ()), *self._wanted.pop(kind)]
                self._wanted[kind.bare()] = deque(sorted(times), maxlen=64)

    def targets(self, budget: int) -> Counter[Kind]:
        """How many of each kind to keep: what a minute wanted, at least one, the latest kinds first, within the budget.

        The last of several is bare, of the latest kind.
        """
        now = self._clock()
        self._wanted = {kind: times for kind, times in self._wanted.items() if times[-1] > now - _FORGET}
        recent = sorted(self._wanted.items(), key=lambda item: item[1][-1], reverse=True)
        bare = {recent[0][0].bare()} if budget > 1 and recent and recent[0][0].provision is not None else set()
        room = budget - len(bare)
        targets: Counter[Kind] = Counter({kind: 1 for kind, _ in recent[:room]})
        for kind, times in recent:
            wanted = sum(1 for at in times if at > now - _WINDOW)
            if targets[kind]:
                targets[kind] += min(max(wanted - 1, 0), room - targets.total())
        targets.update(bare)
        return targets

    def next_change(self) -> float | None:
        """Seconds until a target may fall by itself; None: there is none."""
        if not self._wanted:
            return None
        now = self._clock()
        times = [at + span - now for each in self._wanted.values() for at in each for span in (_WINDOW, _FORGET)]
        return min((left for left in times if left > 0), default=0.0) + _CALM


class Pool(Generic[M]):
    """At most ``budget`` machines that ``make`` has started and nobody has adopted yet."""

    def __init__(self, make: Callable[[MachineSpec], Coroutine[None, None, M]], budget: int) -> None:
        self._make = make
        self._budget = budget
        self._demand = Demand()
        self._stock: dict[Kind, list[M]] = {}
        self._wanted = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._dropping: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._stock.values()))

    def take(self, spec: MachineSpec) -> M | None:
        """A machine of this kind, if one is there; either way more like it will be."""
        if self._budget <= 0:
            return None
        kind = Kind.of(spec)
        self._demand.note(kind)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        self._wanted.set()
        return self._pop(kind) or self._pop(kind.bare())

    def retire(self, owner: str, source: str) -> None:
        """Let go of what has other code of ``owner`` than ``source`` ready."""
        self._demand.retire(owner, source)
        self._wanted.set()

    def _pop(self, kind: Kind) -> M | None:
        stock = self._stock.get(kind, [])
        while stock:
            machine = stock.pop(0)
            if not machine.lost:
                return machine
            self._drop(machine)
        return None

    async def close(self) -> None:
        """Start no more, and end those that nobody has."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        machines = [machine for stock in self._stock.values() for machine in stock]
        self._stock.clear()
        await asyncio.gather(*self._dropping, *map(_end, machines))

    async def _keep(self) -> None:
        while True:
            self._wanted.clear()
            await self._level()
            try:
                async with asyncio.timeout(self._demand.next_change()):
                    await self._wanted.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(_CALM)

    async def _level(self) -> None:
        """Start and end machines, one after the other, until each kind has its number, or somebody wants one."""
        failed: set[Kind] = set()
        while not self._wanted.is_set():
            targets = self._demand.targets(self._budget)
            await self._end_surplus(targets)
            lacking = (kind for kind, target in targets.items() if len(self._stock.get(kind, ())) < target)
            kind = next((kind for kind in lacking if kind not in failed), None)
            if kind is None or memory_is_short():
                return
            if not await self._add(kind):
                failed.add(kind)

    async def _end_surplus(self, targets: Counter[Kind]) -> None:
        for kind, stock in list(self._stock.items()):
            surplus = len(stock) - targets[kind]
            # Too many bare ones are not: they are what the others are made of.
            if surplus > 0 and (kind.provision is not None or len(self) > targets.total()):
                gone, self._stock[kind] = stock[:surplus], stock[surplus:]
                await asyncio.gather(*map(_end, gone))
        self._stock = {kind: stock for kind, stock in self._stock.items() if stock}

    async def _add(self, kind: Kind) -> bool:
        """Have one more of a kind: a bare one with the code put in, if there is one already."""
        try:
            machine = (kind.provision and self._pop(kind.bare())) or await self._make(kind.bare().spec())
            await self._provide(machine, kind.provision)
        except (HelmrError, OSError) as error:
            log.warning("no machine is kept ready: %s", error)
            self._demand.forget(kind)
            return False
        self._stock.setdefault(kind, []).append(machine)
        return True

    async def _provide(self, machine: M, provision: Provision | None) -> None:
        if provision is None:
            return
        try:
            await machine.provide(provision)
        except BaseException:
            self._drop(machine)
            raise

    def _drop(self, machine: M) -> None:
        task = asyncio.create_task(_end(machine))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)


async def _end(machine: Member) -> None:
    try:
        await machine.stop(0)
    except HelmrError as error:
        log.warning("a machine that nobody wants is left: %s", error)  # the next worker of this home removes it
