"""Records of session streams: in order, without a gap, whoever writes and however often."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus import topology
from bus.records import MAX_RECORD, StreamWriter
from bus.setup import ensure_topology
from bus.stored import get_message
from helmr import subjects
from helmr.client import AsyncClient
from helmr.errors import TooLarge, UsageError
from helmr.models import StreamRecord
from helmr.subjects import Scope
from tests.integration.platform import Platform, history
from worker.run_journal import Fenced

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import streams, task
    from helmr.runtime import current

    report = streams.output("report")
    other = streams.output("other")

    @task("report")
    def tell(payload: dict) -> int:
        for n in range(payload["records"]):
            report.append({"n": n}, correlation_id=f"c{n}")
        other.append("one")
        return payload["records"]

    @task("too-large")
    def too_large():
        report.append("x" * 300_000)

    @task("hostile")
    def hostile(payload: dict):
        for message in payload["messages"]:
            current().send(message)
        return "still here"
"""

_SCOPE = Scope("acme", "test")


async def _records(nc: Nats, scope: Scope, session: str, stream: str = "report") -> list[StreamRecord]:
    found: list[StreamRecord] = []
    subject, seq = subjects.io(scope, session, "out", stream), 0
    while (message := await get_message(nc.jetstream(), topology.SESSIONS, subject, after=seq)) is not None:
        seq = message[0]
        found.append(msgspec.json.decode(message[1], type=StreamRecord))
    return found


async def test_records_are_stored_in_order_and_told_in_the_history(helmr: AsyncClient, platform: Platform) -> None:
    started = await helmr.sessions.start("report", {"records": 20})
    run = await started.run.wait(timeout=30)
    assert run.output == 20
    found = await _records(platform.nc, Scope(*helmr.scope), run.session_id)
    assert [record.sequence for record in found] == list(range(1, 21))
    assert [record.data for record in found] == [{"n": n} for n in range(20)]
    assert [record.correlation_id for record in found] == [f"c{n}" for n in range(20)]
    assert {(record.run_id, record.direction) for record in found} == {(run.id, "out")}
    told = [event.data for event in await history(helmr, run) if event.kind == "output"]
    assert [(data["stream"], data["sequence"]) for data in told] == [
        *(("report", n) for n in range(1, 21)),
        ("other", 1),
    ]
    assert [data["record_id"] for data in told[:20]] == [record.id for record in found]


async def test_a_record_that_is_too_large_is_the_tasks_error(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("too-large")).run.wait(timeout=30)
    assert run.failure is not None
    assert run.failure.code == "task_error"
    assert "256 KiB" in run.failure.message


@pytest.mark.parametrize(
    "message",
    [
        {"op": "output", "stream": "a.b", "data": 1},
        {"op": "output", "stream": "a\r\nPUB x 0\r\n\r\n", "data": 1},
        {"op": "output", "stream": ">", "data": 1},
        {"op": "output", "data": 1},
        {"op": "output", "stream": "report", "data": 1, "correlation_id": {"not": "text"}},
        {"op": "output", "stream": "report", "data": "x" * 400_000},
        {"op": "metadata", "metadata": [1, 2]},
        {"op": "metadata"},
        {"op": "metadata", "metadata": {"a": "x" * 400_000}},
        {"op": "result", "parts": 1},
        {"op": "result_part", "data": 5},
        {"op": "error", "message": {"a": 1}, "code": ["x"]},
        {"op": ["x"]},
        {"op": "unheard-of"},
        {},
    ],
    ids=range(15),
)
async def test_a_task_that_breaks_the_protocol_harms_only_itself(helmr: AsyncClient, message: dict[str, Any]) -> None:
    started = await helmr.sessions.start("hostile", {"messages": [message]}, max_duration=20)
    run = await started.run.wait(timeout=10)
    assert run.status in {"succeeded", "failed"}
    assert (run.attempt, run.dispatch_attempt) == (1, 1)
    if run.failure is not None:
        assert run.failure.code in {"task_error", "task_exit"}
    good = await (await helmr.sessions.start("report", {"records": 1}, workspace=run.workspace_id)).run.wait(timeout=10)
    assert good.status == "succeeded"


async def test_writers_that_compete_leave_no_gap(nc: Nats) -> None:
    await ensure_topology(nc)
    writers = [StreamWriter(nc.jetstream(), _SCOPE, "ses_1", f"run_{n}") for n in range(8)]

    async def write(writer: StreamWriter) -> list[int]:
        return [(await writer.append("report", n)).sequence for n in range(10)]

    sequences = await asyncio.gather(*(write(writer) for writer in writers))
    assert sorted(n for own in sequences for n in own) == list(range(1, 81))
    found = await _records(nc, _SCOPE, "ses_1")
    assert [record.sequence for record in found] == list(range(1, 81))
    assert all(own == sorted(own) for own in sequences)


async def test_what_an_earlier_execution_stored_is_found_wherever_it_stands(nc: Nats) -> None:
    """The holder before stored more than it lived to say, and says so no more."""
    await ensure_topology(nc)
    js = nc.jetstream()
    before = StreamWriter(js, _SCOPE, "ses_1", "run_1")
    for number in range(4):
        await before.append("report", number, number=str(number))
    after = StreamWriter(js, _SCOPE, "ses_1", "run_1", look_back=True)
    told = [(await after.append("report", number, number=str(number))).sequence for number in range(1, 6)]
    assert told == [2, 3, 4, 5, 6]
    assert [(record.sequence, record.data) for record in await _records(nc, _SCOPE, "ses_1")] == [
        (number + 1, number) for number in range(6)
    ]


async def test_a_worker_that_lost_its_run_unawares_stores_nothing_twice(nc: Nats) -> None:
    """Both write: the former holder, which does not know yet that it is none, and its successor, which is quicker."""
    await ensure_topology(nc)
    js = nc.jetstream()
    former, successor = (StreamWriter(js, _SCOPE, "ses_1", "run_1", look_back=back) for back in (False, True))
    for number in range(3):
        await former.append("report", number, number=str(number))
    for number in range(6):
        await successor.append("report", number, number=str(number))
    told = [(await former.append("report", number, number=str(number))).sequence for number in range(3, 8)]
    assert told == [4, 5, 6, 7, 8]
    assert (await successor.append("report", 6, number="6")).sequence == 7
    assert [record.data for record in await _records(nc, _SCOPE, "ses_1")] == list(range(8))


async def test_a_worker_that_lost_its_run_before_its_first_record_stores_none(nc: Nats) -> None:
    """It slept, its successor has executed the run, and what its own process wrote meanwhile is there to be stored."""
    await ensure_topology(nc)
    js, looks = nc.jetstream(), 0

    async def lost() -> None:
        nonlocal looks
        looks += 1
        raise Fenced("it is the successor's")

    former = StreamWriter(js, _SCOPE, "ses_1", "run_1", confirm=lost)
    successor = StreamWriter(js, _SCOPE, "ses_1", "run_1", look_back=True)
    for number in range(3):
        await successor.append("report", number, number=str(number))
    with pytest.raises(Fenced):
        await former.append("report", 0, number="0")
    assert [record.data for record in await _records(nc, _SCOPE, "ses_1")] == [0, 1, 2]
    await former.append("other", 0, number="0")
    assert looks == 1, "where nobody has written nothing is to be confirmed"


async def test_the_writer_refuses_what_nobody_could_store(nc: Nats) -> None:
    await ensure_topology(nc)
    writer = StreamWriter(nc.jetstream(), _SCOPE, "ses_1", "run_1")
    with pytest.raises(TooLarge):
        await writer.append("report", "x" * (MAX_RECORD + 2048))
    with pytest.raises(UsageError):
        await writer.append("a.b", 1)
