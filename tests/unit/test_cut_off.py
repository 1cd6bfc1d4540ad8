"""When a worker that the server cannot hear counts itself as cut off: before anybody else does."""

from __future__ import annotations

import asyncio

import pytest

from bus import topology
from worker.cut_off import CutOff


class _Connection:
    is_connected = True


class _Watched:
    """A worker's view, with a clock of the test's own."""

    def __init__(self) -> None:
        self.at = 100.0
        self.connection = _Connection()
        self.cut_off = CutOff(self.connection, clock=lambda: self.at)  # type: ignore[arg-type]

    def passes(self, seconds: float, *, step: float = 0.1) -> None:
        for _ in range(round(seconds / step)):
            self.at += step
            self.cut_off.now()


@pytest.fixture
def watched() -> _Watched:
    return _Watched()


@pytest.mark.parametrize(("connected", "taken_after"), [(True, topology.PRESENCE_TTL), (False, topology.SUSPECT_AFTER)])
def test_it_is_due_before_others_may_take_anything(watched: _Watched, connected: bool, taken_after: float) -> None:
    watched.connection.is_connected = connected
    watched.passes(taken_after - topology.HEARTBEAT / 2 - 0.2)
    assert not watched.cut_off.due
    watched.passes(0.4)
    assert watched.cut_off.due


def test_what_the_server_has_acknowledged_counts_from_when_it_was_said(watched: _Watched) -> None:
    watched.passes(topology.PRESENCE_TTL - topology.HEARTBEAT)
    said = watched.cut_off.now()
    watched.passes(topology.HEARTBEAT / 2)
    watched.cut_off.heard(said)
    watched.passes(topology.PRESENCE_TTL - topology.HEARTBEAT - 0.2)
    assert not watched.cut_off.due
    watched.passes(0.4)
    assert watched.cut_off.due


@pytest.mark.anyio
async def test_everything_is_ended_once_for_each_silence(watched: _Watched) -> None:
    ended = asyncio.Queue[float]()
    watching = asyncio.create_task(watched.cut_off.watch(lambda: ended.put_nowait(watched.at)))
    for _ in range(2):
        watched.passes(topology.PRESENCE_TTL)
        await ended.get()
        watched.passes(topology.PRESENCE_TTL)
        watched.cut_off.heard(watched.cut_off.now())
    watching.cancel()
    assert ended.empty()


def test_sleep_is_no_silence(watched: _Watched) -> None:
    watched.at += 1000.0
    assert not watched.cut_off.due
