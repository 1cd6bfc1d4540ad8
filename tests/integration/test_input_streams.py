"""Input for a session: checked, numbered without a gap, stored once for each key, and read back."""

from __future__ import annotations

import asyncio

import pytest
from nats.aio.client import Client as Nats

from bus import records
from bus.setup import ensure_topology
from helmr import events, ids
from helmr.client import AsyncClient
from helmr.errors import Conflict, NotFound, PayloadInvalid, TooLarge, UsageError
from helmr.models import StreamRecord
from helmr.subjects import Scope

pytestmark = pytest.mark.anyio

TASKS = """
    from typing import TypedDict

    from helmr import streams, task

    class Decision(TypedDict):
        approved: bool

    approval = streams.input("approval", schema=Decision)
    notes = streams.input("notes")
    report = streams.output("report")

    @task("ask")
    def ask(payload: dict) -> str:
        for n in range(payload["records"]):
            report.append({"n": n}, correlation_id=f"c{n % 2}")
        return "done"
"""


async def _session(helmr: AsyncClient, count: int = 0) -> str:
    started = await helmr.sessions.start("ask", {"records": count})
    await started.run.wait(timeout=30)
    return started.session.id


async def test_records_are_numbered_and_listed(helmr: AsyncClient) -> None:
    approval = helmr.sessions.open(await _session(helmr)).input("approval")
    sent = [await approval.send({"approved": n % 2 == 0}, correlation_id=f"c{n % 2}") for n in range(4)]
    assert [record.sequence for record in sent] == [1, 2, 3, 4]
    assert await approval.list() == sent
    assert await approval.list(after=1, limit=2) == sent[1:3]
    assert await approval.list(correlation_id="c1") == [sent[1], sent[3]]


async def test_input_that_does_not_fit_is_refused(helmr: AsyncClient) -> None:
    session = helmr.sessions.open(await _session(helmr))
    with pytest.raises(PayloadInvalid, match="approved"):
        await session.input("approval").send({"approved": "maybe"})
    with pytest.raises(NotFound, match="no input stream") as refused:
        await session.input("aproval").send({"approved": True})
    assert refused.value.hint == "did you mean approval?"
    with pytest.raises(NotFound):
        await session.input("report").send({})
    with pytest.raises(TooLarge):
        await session.input("notes").send("x" * 300_000)
    with pytest.raises(UsageError):
        await session.input("notes").send("x", correlation_id="")
    with pytest.raises(UsageError):
        await session.input("notes").send(object())
    assert await session.input("approval").list() == []


async def test_a_closed_session_takes_no_input(helmr: AsyncClient) -> None:
    session = await _session(helmr)
    await helmr.sessions.close(session)
    with pytest.raises(Conflict, match="closed"):
        await helmr.sessions.open(session).input("notes").send("late")


async def test_a_key_stands_for_one_record(helmr: AsyncClient) -> None:
    session = helmr.sessions.open(await _session(helmr))
    notes = session.input("notes")
    first = await notes.send({"b": 1, "a": 2}, idempotency_key="k")
    await notes.send("another")
    assert await notes.send({"a": 2, "b": 1}, idempotency_key="k") == first
    with pytest.raises(Conflict, match="idempotency key"):
        await notes.send({"a": 3}, idempotency_key="k")
    with pytest.raises(Conflict):
        await notes.send({"a": 2, "b": 1}, idempotency_key="k", correlation_id="c")
    await session.input("approval").send({"approved": True}, idempotency_key="k")
    assert len(await notes.list()) == 2


async def test_many_senders_with_one_key_store_one_record(helmr: AsyncClient) -> None:
    notes = helmr.sessions.open(await _session(helmr)).input("notes")
    sends = [notes.send("same", idempotency_key="k") for _ in range(8)]
    others = [notes.send(n) for n in range(8)]
    same = await asyncio.gather(*sends, *others)
    assert len({record.id for record in same[:8]}) == 1
    stored = await notes.list()
    assert [record.sequence for record in stored] == list(range(1, 10))


async def test_a_key_whose_sender_died_leads_to_its_record(nc: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    await ensure_topology(nc)
    js, scope = nc.jetstream(), Scope("acme", "test")

    def draft() -> StreamRecord:
        return StreamRecord(
            id=ids.new("rec"), session_id="ses_1", stream="s", direction="in", sequence=0, data=1, at=events.now()
        )

    with monkeypatch.context() as patch:
        patch.setattr(records, "publish", _die)
        with pytest.raises(_DiedError):
            await records.send(js, scope, draft(), key="k")
    other = await records.send(js, scope, draft())
    first = await records.send(js, scope, draft(), key="k")
    again = await records.send(js, scope, draft(), key="k")
    assert (other.record.sequence, first.record.sequence) == (1, 2)
    assert again == first


class _DiedError(Exception):
    pass


async def _die(*_: object) -> None:
    raise _DiedError


async def test_output_is_listed_and_followed(helmr: AsyncClient) -> None:
    session = helmr.sessions.open(await _session(helmr, 3))
    assert [record.data for record in await session.output("report").list()] == [{"n": n} for n in range(3)]
    found = []
    async with asyncio.timeout(30):
        async for record in session.output("report").follow(after=1, correlation_id="c0"):
            found.append(record.data["n"])
            break
    assert found == [2]


async def test_a_follower_hears_of_new_records_at_once(helmr: AsyncClient) -> None:
    notes = helmr.sessions.open(await _session(helmr)).input("notes")
    heard: list[int] = []

    async def follow() -> None:
        async for record in notes.follow():
            heard.append(record.data)
            if len(heard) == 3:
                return

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(follow())
        for n in range(3):
            await notes.send(n)
    assert heard == [0, 1, 2]
