"""Whose log is ended on behalf of a worker that is gone: an execution that has ended by itself meanwhile said so itself."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bus.leases import lose_lease
from bus.log import RUN, Log, Position
from bus.presence import Presence
from bus.services.runs import CancelRequest, Runs
from helmr.events import Draft, RunEvent, Wait
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.unit.memory_log import MemoryLog
from tests.unit.runs import spec

pytestmark = pytest.mark.anyio

_SCOPE, _RUN, _WORKER = Scope("acme", "dev"), "run_1", "wrk_a"


class _Raced(MemoryLog):
    """A log to which the worker appends just before somebody else does, once."""

    def __init__(self) -> None:
        super().__init__()
        self.sooner: Draft | None = None

    async def append(self, kind: Any, scope: Scope, entity_id: str, position: Any, draft: Draft, **more: Any) -> Any:
        sooner, self.sooner = self.sooner, None
        if sooner is not None:
            await super().append(kind, scope, entity_id, position, sooner)
        return await super().append(kind, scope, entity_id, position, draft, **more)


class _Nobody(Presence):
    def __init__(self) -> None:
        """Without a connection."""

    def is_alive(self, _worker_id: str) -> bool:
        return False


@pytest.fixture
async def log() -> _Raced:
    made = _Raced()
    position: Position[RunEvent] = Position(0, None)
    for draft in (rules.create(spec(), cause="start", lane="default"), Draft(kind="leased", data=_LEASED)):
        position = await made.append(RUN, _SCOPE, _RUN, position, draft)
    return made


_LEASED = {"worker": _WORKER, "attempt": 1, "dispatch_attempt": 1}


def _runs(log: Log) -> Runs:
    return Runs(log, _Nobody(), cast("Any", None), cast("Any", None))


async def test_the_log_of_an_execution_that_is_lost_is_ended(log: _Raced) -> None:
    lost = await lose_lease(log, _SCOPE, _RUN, _WORKER)
    assert (lost.state.status, lost.state.lease, len(log.beside)) == ("queued", None, 1)


async def test_an_execution_that_ends_before_it_is_lost_is_left_alone(log: _Raced) -> None:
    log.sooner = Draft(kind="succeeded", data={"output": 1}, source="worker")
    lost = await lose_lease(log, _SCOPE, _RUN, _WORKER)
    assert (lost.state.status, len(log.beside)) == ("succeeded", 0)


async def test_what_another_worker_holds_is_not_lost(log: _Raced) -> None:
    await lose_lease(log, _SCOPE, _RUN, "wrk_b")
    assert ((await log.present(RUN, _SCOPE, _RUN)).state.status, len(log.beside)) == ("running", 0)


async def test_a_forced_cancel_ends_the_log_of_a_worker_that_is_gone(log: _Raced) -> None:
    run = await _runs(log).cancel(_SCOPE, CancelRequest(id=_RUN, force=True))
    assert (run.status, len(log.beside)) == ("cancelled", 1)


async def test_a_forced_cancel_of_a_run_that_has_just_begun_to_wait_leaves_its_log_alone(log: _Raced) -> None:
    state = (await log.present(RUN, _SCOPE, _RUN)).state
    log.sooner = rules.wait(state, Wait(kind="timer", name="rest"))
    run = await _runs(log).cancel(_SCOPE, CancelRequest(id=_RUN, force=True))
    assert (run.status, len(log.beside)) == ("cancelled", 0)
