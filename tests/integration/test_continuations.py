"""Sessions that go on with more input: nothing lost, nothing consumed twice, whatever comes first and whoever dies."""

from __future__ import annotations

import asyncio

import pytest

from bus.continuations import Continuations
from bus.log import SESSION
from helmr.client import AsyncClient
from helmr.events import SessionEvent
from helmr.subjects import Scope
from tests.integration.platform import Platform, kinds, until

pytestmark = pytest.mark.anyio

TASKS = """
    from pathlib import Path
    from helmr import streams, task

    notes = streams.input("notes")
    said = streams.output("said")

    @task("chat")
    def chat(payload: dict, ctx):
        before = Path("notes").read_text() if Path("notes").exists() else ""
        if ctx.turn == 0 and payload.get("greets"):
            return "hello"
        note = notes.wait(timeout="1h")
        said.append(note)
        Path("notes").write_text(before + str(note))
        return {"turn": ctx.turn, "note": note, "before": before}

    @task("deaf")
    def deaf(ctx):
        return ctx.turn
"""


async def _turns(helmr: AsyncClient, session: str, number: int) -> None:
    async with asyncio.timeout(30):
        while (await helmr.sessions.get(session)).turn < number:  # noqa: ASYNC110  sessions are not followed live
            await asyncio.sleep(0.02)


async def _rest(helmr: AsyncClient, session: str) -> int:
    """The session's turn when it has come to rest."""
    async with asyncio.timeout(30):
        while True:
            found = await helmr.sessions.get(session)
            run = await helmr.runs.wait(found.run_id)
            again = await helmr.sessions.get(session)
            if again.run_id == run.id and again.activity == "idle":
                await asyncio.sleep(0.3)
                if (await helmr.sessions.get(session)).run_id == run.id:
                    return again.turn


async def test_input_to_an_idle_session_starts_the_next_run(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("chat", {"greets": True})
    first = await started.run.wait(timeout=30)
    assert first.output == "hello"
    session = helmr.sessions.open(started.session)
    await session.input("notes").send("a")
    await _turns(helmr, started.session.id, 1)
    second = await helmr.runs.wait((await helmr.sessions.get(started.session)).run_id, timeout=30)
    assert second.output == {"turn": 1, "note": "a", "before": ""}
    assert (second.turn, second.payload, second.workspace_id) == (1, {"greets": True}, first.workspace_id)
    assert second.deployment_id == first.deployment_id
    await session.input("notes").send("b")
    await _turns(helmr, started.session.id, 2)
    third = await helmr.runs.wait((await helmr.sessions.get(started.session)).run_id, timeout=30)
    assert third.output == {"turn": 2, "note": "b", "before": "a"}
    assert (await kinds(helmr, third))[0] == "queued"


async def test_a_burst_of_input_is_worked_off_one_by_one(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("chat", {})
    session = helmr.sessions.open(started.session)
    await asyncio.gather(*(session.input("notes").send(n) for n in range(6)))
    assert await _rest(helmr, started.session.id) == 5
    assert sorted(record.data for record in await session.output("said").list()) == list(range(6))


async def test_a_task_that_does_not_listen_is_started_once_for_what_is_there(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("deaf")
    await started.run.wait(timeout=30)
    notes = helmr.sessions.open(started.session).input("notes")
    await notes.send(1)
    assert await _rest(helmr, started.session.id) == 1
    await notes.send(2)
    assert await _rest(helmr, started.session.id) == 2


async def test_a_cancelled_run_leaves_its_session_open(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("chat", {})
    await until(helmr, started.run, "waiting")
    await started.run.cancel()
    assert (await helmr.sessions.get(started.session)).turn == 0
    await helmr.sessions.open(started.session).input("notes").send("after")
    await _turns(helmr, started.session.id, 1)
    run = await helmr.runs.wait((await helmr.sessions.get(started.session)).run_id, timeout=30)
    assert run.output["note"] == "after"


async def test_a_repeated_start_finds_the_run_of_a_turn_that_is_just_being_made(
    helmr: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, make_run = asyncio.Event(), Continuations._make_run

    async def hesitates(self: Continuations, scope: Scope, turned: SessionEvent) -> None:
        if not making.is_set():
            making.set()
            await asyncio.Event().wait()
        await make_run(self, scope, turned)

    started = await helmr.sessions.start("chat", {"greets": True}, external_id="again")
    await started.run.wait()
    monkeypatch.setattr(Continuations, "_make_run", hesitates)
    await helmr.sessions.open(started.session).input("notes").send("a")
    async with asyncio.timeout(60):
        await making.wait()
    again = await helmr.sessions.start("chat", {"greets": True}, external_id="again")
    assert again.reused
    assert again.run.id != started.run.id
    assert (await again.run.wait(timeout=60)).output == {"turn": 1, "note": "a", "before": ""}


async def test_a_turn_whose_maker_died_gets_its_run(
    helmr: AsyncClient, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = await helmr.sessions.start("chat", {"greets": True})
    await started.run.wait(timeout=30)

    async def dies(*_: object) -> None:
        return

    with monkeypatch.context() as patch:
        patch.setattr(Continuations, "_make_run", dies)
        await helmr.sessions.open(started.session).input("notes").send("a")
        await _turns(helmr, started.session.id, 1)
    session = await helmr.sessions.get(started.session)
    scope = Scope(*helmr.scope)
    event = await platform.control.log.present(SESSION, scope, session.id)
    assert (event.kind, event.data["previous"]) == ("turn", started.run.id)
    continuations = platform.control.reactors.continuations
    await asyncio.gather(*(continuations.check(scope, session.id) for _ in range(4)))
    run = await helmr.runs.wait(session.run_id, timeout=30)
    assert run.output == {"turn": 1, "note": "a", "before": ""}
    assert await _rest(helmr, session.id) == 1
