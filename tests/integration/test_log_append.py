"""The one append: compare-and-set against a real server, from many writers at once."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from datetime import timedelta

import pytest
from nats.aio.client import Client as Nats

from bus import timers, topology
from bus.log import RUN, Log, Position
from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from bus.stored import Superseded, get_message
from helmr import events, ids, subjects
from helmr.connection import connect
from helmr.errors import Conflict, NotFound, TooLarge, Unavailable
from helmr.events import Draft, RunEvent, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope
from tests.unit.runs import spec

pytestmark = pytest.mark.anyio

_SCOPE = Scope("acme", "test")


@pytest.fixture
async def log(nc: Nats) -> Log:
    await ensure_topology(nc)
    return Log(nc)


async def _running(log: Log) -> Position[RunEvent]:
    """A run in the hands of a worker."""
    run_id = ids.new("run")
    draft = rules.create(spec(), cause="start", lane="default")
    position = await log.append(RUN, _SCOPE, run_id, Position(0, None), draft)
    return await log.append(RUN, _SCOPE, run_id, position, rules.lease(position.state, worker="wrk_a", dispatch=1))


def _output(n: int) -> Draft:
    return Draft(kind="output", data={"n": n})


def _always(draft: Draft, _: RunState) -> Draft:
    return draft


async def test_what_was_appended_is_read_back(log: Log) -> None:
    position = await _running(log)
    run_id = position.state.id
    assert await log.last(RUN, _SCOPE, run_id) == position
    assert (await log.first(RUN, _SCOPE, run_id)).kind == "queued"
    assert [event.kind for event in await log.events(RUN, _SCOPE, run_id)] == ["queued", "leased"]
    assert [event.cursor for event in await log.events(RUN, _SCOPE, run_id, after=1)] == [2]
    assert len(await log.events(RUN, _SCOPE, run_id, limit=1)) == 1


async def test_eight_writers_that_compete_win_once_each_turn(log: Log, nats_url: str) -> None:
    position = await _running(log)
    run_id = position.state.id
    clients = [await connect(nats_url, name=f"writer-{n}") for n in range(8)]
    won: list[int] = []

    async def write(client: Nats, number: int) -> None:
        own = Log(client)
        for n in range(10):
            draft = _output(number * 100 + n)
            await own.transact(RUN, _SCOPE, run_id, functools.partial(_always, draft))
            won.append(number * 100 + n)

    await asyncio.gather(*(write(client, number) for number, client in enumerate(clients)))
    events = await log.events(RUN, _SCOPE, run_id)
    assert [event.cursor for event in events] == list(range(1, 83))
    assert sorted(event.data["n"] for event in events[2:]) == sorted(won)
    for client in clients:
        await client.close()


async def test_one_of_many_wins_from_one_position(log: Log) -> None:
    position = await _running(log)
    tries = (log.append(RUN, _SCOPE, position.state.id, position, _output(n)) for n in range(20))
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(result, Position) for result in results) == 1
    assert sum(isinstance(result, Superseded) for result in results) == 19


async def test_entities_do_not_disturb_one_another(log: Log) -> None:
    one, other = await _running(log), await _running(log)
    for n in range(3):
        one = await log.append(RUN, _SCOPE, one.state.id, one, _output(n))
        other = await log.append(RUN, _SCOPE, other.state.id, other, _output(n))
    assert one.state.cursor == other.state.cursor == 5


async def test_an_entity_begins_once(log: Log) -> None:
    position = await _running(log)
    draft = rules.create(spec(), cause="start", lane="default")
    with pytest.raises(Superseded):
        await log.append(RUN, _SCOPE, position.state.id, Position(0, None), draft)


async def test_what_the_rules_refuse_is_not_stored(log: Log) -> None:
    position = await _running(log)
    with pytest.raises(Conflict):
        await log.append(RUN, _SCOPE, position.state.id, position, Draft(kind="expired"))
    assert await log.last(RUN, _SCOPE, position.state.id) == position


async def test_a_decision_may_be_to_do_nothing(log: Log) -> None:
    position = await _running(log)
    assert await log.transact(RUN, _SCOPE, position.state.id, lambda _: None) == position


async def test_an_entity_nobody_knows_is_not_found(log: Log) -> None:
    def decide(_: RunState) -> Draft:
        raise AssertionError("nothing to decide on")

    for ask in (log.first, log.present):
        with pytest.raises(NotFound):
            await ask(RUN, _SCOPE, "run_none")
    with pytest.raises(NotFound):
        await log.transact(RUN, _SCOPE, "run_none", decide)


async def test_an_event_that_is_too_large_is_refused(log: Log) -> None:
    position = await _running(log)
    with pytest.raises(TooLarge):
        await log.append(RUN, _SCOPE, position.state.id, position, Draft(kind="output", data={"x": "y" * 9_000_000}))


async def test_an_unknown_outcome_is_resolved(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stored the event, and the answer was lost."""
    position = await _running(log)
    real, lost = log._publish, [True]

    async def publish(subject: str, body: bytes, headers: dict[str, str]) -> int:
        seq = await real(subject, body, headers)
        if lost.pop() if lost else False:
            raise Unavailable("the answer was lost")
        return seq

    monkeypatch.setattr(log, "_publish", publish)
    after = await log.append(RUN, _SCOPE, position.state.id, position, _output(1))
    assert after == await log.last(RUN, _SCOPE, position.state.id)
    assert after.state.cursor == 3


async def test_it_is_resolved_although_the_question_is_not_answered_at_first(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = await _running(log)
    publish, last, silences = log._publish, log.last, ["publish", "last", "last"]

    async def twice(subject: str, body: bytes, headers: dict[str, str]) -> int:
        seq = await publish(subject, body, headers)
        if "publish" in silences:
            silences.remove("publish")
            raise Unavailable("the answer was lost")
        return seq

    async def slow(*arguments: object) -> object:
        if "last" in silences:
            silences.remove("last")
            raise Unavailable("NATS does not answer")
        return await last(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(log, "_publish", twice)
    monkeypatch.setattr(log, "last", slow)
    appended = await log.append(RUN, _SCOPE, position.state.id, position, _output(1))
    assert (silences, appended.event and appended.event.data) == ([], {"n": 1})


async def test_an_append_outlasts_a_restart_of_the_server(log: Log, nats_server: EmbeddedServer) -> None:
    position = await _running(log)
    keeping = asyncio.create_task(nats_server.supervise())
    assert nats_server.pid is not None
    os.kill(nats_server.pid, signal.SIGKILL)
    for n in range(5):
        position = await log.append(RUN, _SCOPE, position.state.id, position, _output(n))
    found = await log.events(RUN, _SCOPE, position.state.id)
    assert [event.cursor for event in found] == list(range(1, 8))
    await nats_server.stop()
    await keeping


async def test_a_timer_is_set_while_the_server_restarts(log: Log, nats_server: EmbeddedServer) -> None:
    keeping = asyncio.create_task(nats_server.supervise())
    run_ids = [ids.new("run") for _ in range(5)]
    assert nats_server.pid is not None
    os.kill(nats_server.pid, signal.SIGKILL)
    for run_id in run_ids:
        await timers.arm(log, _SCOPE, run_id, "ttl", events.now() + timedelta(hours=1))
    for run_id in run_ids:
        assert await get_message(log.js, topology.RUNS, subjects.timer(_SCOPE, run_id, "ttl")) is not None
    await nats_server.stop()
    await keeping


async def test_patience_ends_and_the_connection_can_be_closed(nats_server: EmbeddedServer, nc: Nats) -> None:
    await ensure_topology(nc)
    log = Log(nc, patience=0.3)
    position = await _running(log)
    await nats_server.stop()
    with pytest.raises(Unavailable):
        await log.append(RUN, _SCOPE, position.state.id, position, _output(1))
    with pytest.raises(Unavailable):
        await timers.arm(log, _SCOPE, position.state.id, "ttl", events.now())
    await nc.close()
    assert nc.is_closed
