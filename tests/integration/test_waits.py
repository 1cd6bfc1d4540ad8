"""Runs that wait: for records, tokens and timers; where they are or by replay; each step executed once."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from helmr.events import RunState
from tests.integration.platform import Platform, history, kinds, running, state_of, until, written

pytestmark = pytest.mark.anyio

TASKS = """
    import asyncio
    import os
    from pathlib import Path
    from typing import TypedDict

    import helmr
    from helmr import Retry, logger, metadata, step, step_async, streams, task, timers, tokens

    class Decision(TypedDict):
        approved: bool

    approval = streams.input("approval", schema=Decision)
    notes = streams.input("notes")
    report = streams.output("report")

    def log(name):
        with open("effects", "a") as file:
            file.write(name + "\\n")
        return os.getpid()

    def effects():
        return Path("effects").read_text().split()

    @task("ask")
    def ask():
        print("before")
        before = os.getpid()
        metadata.set("pid", before)
        decision = approval.wait(timeout="1h", correlation_id="pr-42")
        print("after")
        return {"decision": decision, "same": before == os.getpid()}

    @task("parked", park_after=0)
    def parked(payload: dict, ctx) -> dict:
        print("one", flush=True)
        logger.info("begins", replaying=ctx.replaying)
        first = step("first", log, "first")
        stamp, chance, ident = helmr.now(), helmr.random(), helmr.uuid4()
        metadata.set("phase", "waiting")
        metadata.increment("waits")
        report.append({"n": 1})
        decision = approval.wait()
        print("two", flush=True)
        second = step("second", log, "second")
        report.append({"n": 2})
        metadata.increment("waits")
        note = notes.wait()
        print("three", flush=True)
        step("third", log, "third")
        timers.sleep(0.05)
        print("four", flush=True)
        report.append({"n": 3, "stamp": stamp.isoformat(), "chance": chance, "ident": str(ident)})
        return {
            "pids": len({first, second, os.getpid()}), "effects": effects(), "decision": decision, "note": note,
            "replaying": ctx.replaying, "waits": metadata.get("waits"),
        }

    @task("impatient", park_after=0)
    def impatient():
        try:
            approval.wait(timeout=0.05)
        except helmr.WaitTimeout as late:
            return str(late)

    @task("twice")
    async def twice():
        waiting = asyncio.create_task(approval.wait_async(timeout="1h"))
        await asyncio.sleep(0)
        try:
            await notes.wait_async(timeout="1h")
        except helmr.ConcurrentWait as refused:
            kind = type(refused).__name__
        return {"refused": kind, "decision": await waiting}

    @task("fickle", park_after=0)
    def fickle():
        step(f"step-{os.getpid()}", log, "x")
        approval.wait()

    @task("fails-in-step", park_after=0, retry=Retry(max_attempts=2, min_delay=0.01))
    def fails_in_step(ctx):
        step("fine", log, "fine")
        try:
            step("bad", log_and_raise, "caught")
        except helmr.StepFailed as failure:
            caught = str(failure)
        notes.wait()
        step("flaky", flaky, ctx.attempt)
        return {"caught": caught, "effects": effects()}

    def log_and_raise(name):
        log(name)
        raise ValueError(name)

    def flaky(attempt):
        log(f"flaky{attempt}")
        if attempt == 1:
            raise OSError("once")

    @task("tokens", park_after=0)
    def with_token():
        token = tokens.create(timeout="1h", tags=["review"], metadata={"for": "ada"})
        metadata.set("token", token.id)
        return token.wait()

    @task("async", park_after=0)
    async def asynchronous():
        async def work(n):
            log(f"w{n}")
            await asyncio.sleep(0.01)
            return n
        both = await asyncio.gather(step_async("a", work, 1), step_async("b", work, 2))
        async for note in notes.on_async(timeout=0.3):
            log("note")
            return {"both": both, "note": note, "effects": effects()}

    @task("several")
    def several(payload: int):
        found = [notes.once() for _ in range(2)]
        peeked = notes.peek()
        return [*found, peeked, *(notes.wait() for _ in range(payload))]
"""


async def _waiting(helmr: AsyncClient, task: str, payload: object = None) -> tuple[str, str]:
    started = await helmr.sessions.start(task, payload)
    await until(helmr, started.run, "waiting")
    return started.run.id, started.session.id


async def test_a_record_continues_the_very_process(helmr: AsyncClient, platform: Platform) -> None:
    run, session = await _waiting(helmr, "ask")
    state: RunState = await state_of(platform, helmr, run)
    assert (state.status, state.lease, state.dispatch) == ("waiting", None, None)
    assert state.wait is not None
    assert (state.wait.kind, state.wait.stream, state.wait.correlation_id) == ("stream", "approval", "pr-42")
    stream = helmr.sessions.open(session).input("approval")
    await stream.send({"approved": False}, correlation_id="pr-41")
    await stream.send({"approved": True}, correlation_id="pr-42")
    done = await helmr.runs.wait(run, timeout=30)
    assert (done.status, done.output) == ("succeeded", {"decision": {"approved": True}, "same": True})
    assert await kinds(helmr, run) == [
        *("queued", "leased", "started", "metadata", "waiting", "wait_completed", "queued", "leased", "succeeded"),
    ]
    assert (await written(helmr, run))["stdout"] == b"before\nafter\n"


async def test_a_parked_run_resumes_by_replay(helmr: AsyncClient) -> None:
    run, session = await _waiting(helmr, "parked", {})
    streams = helmr.sessions.open(session)
    await streams.input("notes").send("early")
    await streams.input("approval").send({"approved": True})
    done = await helmr.runs.wait(run, timeout=30)
    assert done.failure is None
    assert done.output["effects"] == ["first", "second", "third"]
    assert (done.output["decision"], done.output["note"]) == ({"approved": True}, "early")
    assert (done.output["replaying"], done.output["waits"]) == (False, 2)
    assert done.metadata == {"phase": "waiting", "waits": 2}
    assert [record.data["n"] for record in await streams.output("report").list()] == [1, 2, 3]
    found = await written(helmr, run)
    assert found["stdout"] == b"one\ntwo\nthree\nfour\n"
    assert found["log"].count(b"begins") == 1
    assert done.attempt == 1


async def test_a_wait_times_out(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("impatient")
    done = await started.run.wait(timeout=30)
    assert done.output == "approval did not come in time"
    assert "wait_timed_out" in await kinds(helmr, done)


async def test_a_second_wait_is_refused_and_the_first_goes_on(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("twice")
    await until(helmr, started.run, "waiting")
    await helmr.sessions.open(started.session).input("approval").send({"approved": True})
    done = await started.run.wait(timeout=30)
    assert done.status == "succeeded", done.failure
    assert done.output == {"refused": "ConcurrentWait", "decision": {"approved": True}}


async def test_another_way_than_before_fails_the_run(helmr: AsyncClient) -> None:
    run, session = await _waiting(helmr, "fickle")
    await helmr.sessions.open(session).input("approval").send({"approved": True})
    done = await helmr.runs.wait(run, timeout=30)
    assert done.failure is not None
    assert done.failure.code == "nondeterminism"
    assert "expected step 'step-" in done.failure.message
    assert "found step 'step-" in done.failure.message


async def test_a_failed_step_is_recorded_and_a_new_attempt_tries_it_again(helmr: AsyncClient) -> None:
    run, session = await _waiting(helmr, "fails-in-step")
    await helmr.sessions.open(session).input("notes").send(1)
    done = await helmr.runs.wait(run, timeout=30)
    assert done.status == "succeeded", done.failure
    assert done.attempt == 2
    assert done.output["effects"] == ["fine", "caught", "flaky1", "flaky2"]
    assert done.output["caught"] == "step 'bad' failed: ValueError: caught"


async def test_steps_may_run_beside_each_other(helmr: AsyncClient) -> None:
    run, session = await _waiting(helmr, "async")
    await helmr.sessions.open(session).input("notes").send("n")
    done = await helmr.runs.wait(run, timeout=30)
    assert done.status == "succeeded", done.failure
    assert (done.output["both"], done.output["note"]) == ([1, 2], "n")
    assert sorted(done.output["effects"]) == ["note", "w1", "w2"]


async def test_each_record_is_consumed_once(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("several", 3)
    await until(helmr, started.run, "waiting", count=3)
    notes = helmr.sessions.open(started.session).input("notes")
    for n in range(4):
        await notes.send(n)
    done = await started.run.wait(timeout=30)
    assert done.output == [None, None, None, 0, 1, 2]


async def test_a_waiting_run_is_cancelled_at_once_and_its_process_ends(helmr: AsyncClient) -> None:
    run, _ = await _waiting(helmr, "ask")
    pid = int((await until(helmr, run, "metadata")).data["metadata"]["pid"])
    done = await helmr.runs.cancel(run, reason="enough")
    assert done.status == "cancelled"
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(_ended(pid), 20)
    assert not Path(f"/proc/{pid}").exists()


async def _ended(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110  nothing tells when another's child ends
        await asyncio.sleep(0.02)


async def test_a_run_waits_over_the_loss_of_everything_but_the_store(tmp_path: Path) -> None:
    """Each time on a machine that has nothing of the one before, not even its name."""

    @asynccontextmanager
    async def machine(number: int) -> AsyncIterator[Platform]:
        async with running(tmp_path / "server", workers=0) as platform:
            await platform.add_worker(home=tmp_path / f"machine-{number}")
            yield platform
        for folder in tmp_path.glob(f"machine-{number}"):
            shutil.rmtree(folder)
        for path in (tmp_path / "server").iterdir():
            if path.name != "nats":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    async with machine(0) as platform:
        client = await platform.project("acme", TASKS)
        run, session = await _waiting(client, "parked", {"sleep": 0.05})
    async with machine(1) as platform:
        client = await platform.client("acme")
        await client.sessions.open(session).input("approval").send({"approved": True})
        await until(client, run, "waiting", count=2)
    async with machine(2) as platform:
        client = await platform.client("acme")
        await client.sessions.open(session).input("notes").send("n")
        await until(client, run, "waiting", count=3)
    async with machine(3) as platform:
        client = await platform.client("acme")
        done = await client.runs.wait(run, timeout=60)
        assert done.status == "succeeded", done.failure
        assert done.output["effects"] == ["first", "second", "third"]
        assert len([e for e in await history(client, run) if e.kind == "step"]) == 6
        assert (await written(client, run))["stdout"] == b"one\ntwo\nthree\nfour\n"


async def test_an_order_to_stop_a_workspace_parks_its_run(helmr: AsyncClient) -> None:
    run, session = await _waiting(helmr, "ask")
    await helmr.workspaces.stop((await helmr.runs.get(run)).workspace_id)
    await helmr.sessions.open(session).input("approval").send({"approved": True}, correlation_id="pr-42")
    assert (await helmr.runs.wait(run, timeout=60)).status == "succeeded"
    assert (await kinds(helmr, run)).count("started") == 2  # the second time by replay
