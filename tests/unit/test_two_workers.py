"""Two workers and one run, in every order: whatever one of them believes, only the holder of the lease is heard.

The leasing, the journal and the log are the real ones; the stream below is a list with compare-and-set. A worker that is
"stopped" simply does not act for a while: all its knowledge is then out of date, as after SIGSTOP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from nats.aio.msg import Msg

from bus.leases import lose_lease
from bus.log import RUN, Position
from bus.pull import Delivery
from bus.queueing import redispatch
from helmr import subjects
from helmr.errors import Conflict
from helmr.events import TERMINAL, Draft, RunEvent, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.unit.memory_log import MemoryLog
from tests.unit.runs import spec
from worker.leasing import Held, Stale, take_lease
from worker.liveness import Liveness
from worker.run_journal import Fenced, RunJournal

pytestmark = pytest.mark.anyio

_SCOPE = Scope("acme", "dev")
_RUN = "run_1"
_DEPTH = 5
Action = tuple[str, str]
_WORKERS = ("wrk_a", "wrk_b")
_ACTIONS: tuple[Action, ...] = (
    *(
        (verb, worker)
        for verb in ("first", "again", "append", "complete", "hand_back", "check", "lost")
        for worker in _WORKERS
    ),
    ("cancel", ""),
    ("force", ""),
    ("redispatch", ""),
)


class _World:
    """One run, two workers, and what each of them believes."""

    def __init__(self) -> None:
        self.log = MemoryLog()
        self.journals: dict[str, RunJournal] = {}
        self.fenced: set[str] = set()
        self.presumed_dead: set[str] = set()
        self.refused: set[str] = set()

    async def begin(self) -> None:
        draft = rules.create(spec(), cause="start", lane="default")
        await self.log.append(RUN, _SCOPE, _RUN, Position(0, None), draft)

    def is_alive(self, worker: str) -> bool:
        return worker not in self.presumed_dead

    async def confirm_gone(self, worker: str) -> bool:
        return worker in self.presumed_dead

    def events(self) -> list[RunEvent]:
        return [RUN.decode(body) for _, body in self.log.messages]

    def _messages(self) -> list[Delivery]:
        """Every dispatch message there ever was: an old one may still lie in a worker's hands."""
        found = []
        for seq, (subject, body) in enumerate(self.log.messages, start=1):
            if subjects.parse_event(subject).kind == "queued":
                found.append(Delivery(Msg(_client=cast("Any", None), subject=subject, data=body), seq, 1, 0))
        return found

    async def act(self, action: Action) -> None:
        verb, worker = action
        before = self.events()
        step: Callable[[str], Awaitable[None]] = getattr(self, f"do_{verb}")
        try:
            await step(worker)
        except (Stale, Held, Conflict):
            pass
        except Fenced:
            self.fenced.add(worker)
        self.check(before, self.events(), action)

    async def do_first(self, worker: str) -> None:
        """The oldest dispatch message arrives, believed to be new."""
        await self._lease(worker, self._messages()[0])

    async def do_again(self, worker: str) -> None:
        """The newest dispatch message is delivered again."""
        await self._lease(worker, self._messages()[-1]._replace(delivered=2))

    async def _lease(self, worker: str, item: Delivery) -> None:
        liveness = cast("Liveness", self)
        event = RUN.decode(item.msg.data)
        position = await take_lease(self.log, liveness, _SCOPE, item, event, worker=worker)
        self.journals[worker] = RunJournal(self.log, _SCOPE, position, lambda _: None)
        self.fenced.discard(worker)

    async def _write(self, worker: str, decide: Callable[[RunState], Draft]) -> None:
        if worker in self.journals:
            await self.journals[worker].append(decide)

    async def do_append(self, worker: str) -> None:
        await self._write(worker, lambda _: Draft(kind="output", source="task", data={"by": worker}))

    async def do_complete(self, worker: str) -> None:
        await self._write(worker, lambda _: Draft(kind="succeeded", data={"output": worker}, source="worker"))

    async def do_hand_back(self, worker: str) -> None:
        await self._write(
            worker, lambda state: rules.abandon(state, spec(), reason="stop", began=True, at=state.created_at)
        )

    async def do_check(self, worker: str) -> None:
        if worker in self.journals:
            await self.journals[worker].check()

    async def do_lost(self, worker: str) -> None:
        """Everybody else takes the worker for dead; it may be alive all the same."""
        self.presumed_dead.add(worker)
        await lose_lease(self.log, _SCOPE, _RUN, worker)

    async def do_redispatch(self, _: str) -> None:
        last = self.events()[-1]
        await redispatch(self.log, _SCOPE, _RUN, dispatch=last.state.dispatch, lane="other")

    async def do_cancel(self, _: str, *, force: bool = False) -> None:
        def decide(state: RunState) -> Draft | None:
            alive = state.lease is not None and self.is_alive(state.lease.worker)
            return rules.cancel(state, reason=None, force=force, holder_alive=alive)

        await self.log.transact(RUN, _SCOPE, _RUN, decide)

    async def do_force(self, _: str) -> None:
        await self.do_cancel("", force=True)

    def check(self, before: list[RunEvent], after: list[RunEvent], action: Action) -> None:
        """What holds after every step, whoever took it."""
        verb, worker = action
        assert after[: len(before)] == before
        assert [event.cursor for event in after] == list(range(1, len(after) + 1))
        ends = [n for n, event in enumerate(after) if event.kind in TERMINAL]
        assert ends in ([], [len(after) - 1]), "one terminal event at most, and nothing after it"
        attempts = [event.dispatch_attempt for event in after]
        assert attempts == sorted(attempts), "dispatch attempts only rise within an attempt"
        assert {event.attempt for event in after} <= {None, 1}
        if len(after) == len(before) or verb not in {"append", "complete", "hand_back"}:
            return
        holder = before[-1].state.lease
        assert holder is not None
        assert holder.worker == worker, "only the holder of the lease writes"
        assert worker not in self.fenced, "who was fenced stays silent"

    def signature(self) -> tuple[object, ...]:
        """Two worlds that look like this will go on in the same way."""
        history = tuple(
            (e.kind, e.state.lease.worker if e.state.lease else None, e.data.get("by")) for e in self.events()
        )
        beliefs = tuple((w, j.state.cursor, j._lease.cursor) for w, j in sorted(self.journals.items()))
        return history, beliefs, frozenset(self.fenced), frozenset(self.presumed_dead)


async def _replay(path: tuple[Action, ...]) -> _World:
    world = _World()
    await world.begin()
    for action in path:
        await world.act(action)
    return world


async def test_the_fence_holds_in_every_order() -> None:
    seen: set[tuple[object, ...]] = set()
    kinds: set[str] = set()
    waiting: deque[tuple[Action, ...]] = deque([()])
    while waiting:
        path = waiting.popleft()
        world = await _replay(path)
        mark = world.signature()
        if mark in seen:
            continue
        seen.add(mark)
        events = world.events()
        kinds |= {event.kind for event in events}
        if len(path) < _DEPTH and not events[-1].state.terminal:
            waiting.extend((*path, action) for action in _ACTIONS)
        elif events[-1].state.terminal:
            for action in _ACTIONS:  # a terminal state absorbs whatever is still tried
                await world.act(action)
            assert len(world.events()) == len(events)
    assert kinds >= {"queued", "leased", "output", "lease_lost", "cancel_requested", "succeeded", "cancelled"}
    assert len(seen) > 1000


async def test_a_worker_that_slept_through_its_replacement_is_fenced() -> None:
    world = await _replay(
        (("first", "wrk_a"), ("lost", "wrk_a"), ("again", "wrk_b"), ("append", "wrk_a"), ("complete", "wrk_b"))
    )
    assert world.fenced == {"wrk_a"}
    assert [event.kind for event in world.events()] == ["queued", "leased", "lease_lost", "leased", "succeeded"]
    assert world.events()[-1].data["output"] == "wrk_b"


async def test_a_cancel_that_came_in_between_does_not_fence_the_holder() -> None:
    world = await _replay((("first", "wrk_a"), ("cancel", ""), ("append", "wrk_a"), ("complete", "wrk_a")))
    assert not world.fenced
    assert [event.kind for event in world.events()] == ["queued", "leased", "cancel_requested", "output", "succeeded"]


async def test_a_run_handed_back_after_a_cancel_is_over() -> None:
    world = await _replay((("first", "wrk_a"), ("cancel", ""), ("hand_back", "wrk_a")))
    assert world.events()[-1].kind == "cancelled"


async def test_a_forced_cancel_ends_the_run_of_a_worker_that_is_gone() -> None:
    world = await _replay((("first", "wrk_a"),))
    world.presumed_dead.add("wrk_a")
    await world.act(("force", ""))
    await world.act(("append", "wrk_a"))
    assert world.events()[-1].kind == "cancelled"
    assert world.fenced == {"wrk_a"}
