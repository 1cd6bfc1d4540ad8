"""A run from its start to its end: what it returns, how it fails, and what everybody sees of it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from helmr.client import AsyncClient
from helmr.errors import NotFound, PayloadInvalid, RunFailed, TimedOut, UsageError
from helmr.models import Run
from tests.integration.platform import history, kinds, written

pytestmark = pytest.mark.anyio

TASKS = """
    import asyncio, os, signal, sys, time
    from dataclasses import dataclass
    from helmr import logger, metadata, task

    @dataclass
    class Greeting:
        name: str
        times: int = 1

    @dataclass
    class Answer:
        total: int

    @task("greet")
    def greet(payload: Greeting) -> dict:
        print("hello", payload.name)
        return {"greeting": f"hello {payload.name}" * payload.times}

    @task("context")
    def context(ctx) -> dict:
        return {"run": ctx.run["id"] if isinstance(ctx.run, dict) else ctx.run.id, "attempt": ctx.attempt}

    @task("async")
    async def asynchronous(payload: dict) -> dict:
        await asyncio.sleep(0)
        return payload

    @task("nothing")
    def nothing():
        pass

    @task("metadata")
    def changes():
        metadata.set("phase", "one")
        metadata.set("phase", "two")

    @task("raise")
    def raises():
        raise ValueError("no such thing")

    @task("chain")
    def chain():
        try:
            raises.fn()
        except ValueError as error:
            raise RuntimeError("and so") from error

    @task("exit")
    def leave(payload: dict):
        sys.exit(payload["code"])

    @task("hard-exit")
    def hard_exit(payload: dict):
        print("before", flush=True)
        os._exit(payload["code"])

    @task("signal")
    def kill_self(payload: dict):
        os.kill(os.getpid(), payload["number"])
        time.sleep(30)

    @task("not-json")
    def not_json():
        return object()

    @task("wrong-type")
    def wrong_type() -> Answer:
        return {"total": "many"}

    @task("large")
    def large(payload: dict) -> str:
        return "x" * payload["size"]

    @task("recursion")
    def recursion():
        recursion.fn()

    @task("slow", max_duration=5)
    def slow(payload: dict):
        print("begun", flush=True)
        time.sleep(payload["seconds"])
"""


async def _run(helmr: AsyncClient, task: str, payload: Any = None, **options: Any) -> Run:
    started = await helmr.sessions.start(task, payload, **options)
    return await started.run.wait(timeout=30)


async def test_a_run_succeeds_with_its_output(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("greet", {"name": "Ada"}, tags=["b", "a"], metadata={"for": "test"})
    assert started.run.record.status == "queued"
    run = await started.run.wait(timeout=30)
    assert run.status == "succeeded"
    assert run.output == {"greeting": "hello Ada"}
    assert (run.failure, run.exit_code, run.attempt, run.dispatch_attempt) == (None, 0, 1, 1)
    assert (run.tags, run.metadata, run.payload) == (("a", "b"), {"for": "test"}, {"name": "Ada"})
    assert run.created_at <= (run.started_at or run.created_at) <= (run.finished_at or run.created_at)
    assert 0 < run.active_seconds < 10
    assert await kinds(helmr, run) == ["queued", "leased", "started", "succeeded"]
    assert run.cursor == 4
    session = await helmr.sessions.get(started.session)
    assert (session.status, session.activity, session.run_id) == ("open", "idle", run.id)


async def test_an_event_has_the_documented_shape(helmr: AsyncClient) -> None:
    run = await _run(helmr, "greet", {"name": "Ada"})
    for event in await history(helmr, run):
        shown = msgspec.to_builtins(event)
        assert set(shown) == {
            *("cursor", "id", "run_id", "kind", "at", "attempt", "dispatch_attempt", "source", "message", "data")
        }
        assert shown["run_id"] == run.id
        assert shown["source"] in {"control", "worker", "task"}
        assert event.at.tzinfo is not None
    queued, leased = (await history(helmr, run))[:2]
    assert (queued.data["cause"], queued.attempt) == ("start", None)
    assert (leased.attempt, leased.data["dispatch_attempt"]) == (1, 1)
    assert leased.data["worker"].startswith("wrk_")


async def test_the_handle_returns_the_result_or_raises_what_went_wrong(helmr: AsyncClient) -> None:
    good = await helmr.sessions.start("async", {"n": 1})
    assert await good.run.result(timeout=30) == {"n": 1}
    bad = await helmr.sessions.start("raise")
    with pytest.raises(RunFailed, match="task_error: no such thing") as failed:
        await bad.run.result(timeout=30)
    assert failed.value.details["status"] == "failed"


async def test_a_task_may_take_and_return_nothing(helmr: AsyncClient) -> None:
    run = await _run(helmr, "nothing")
    assert (run.status, run.output) == ("succeeded", None)


async def test_a_task_knows_its_run(helmr: AsyncClient) -> None:
    run = await _run(helmr, "context")
    assert run.output == {"run": run.id, "attempt": 1}


async def test_metadata_is_the_last_that_was_set(helmr: AsyncClient) -> None:
    run = await _run(helmr, "metadata", metadata={"phase": "zero", "kept": True})
    assert run.metadata == {"phase": "two", "kept": True}


async def test_an_exception_comes_with_its_traceback(helmr: AsyncClient) -> None:
    run = await _run(helmr, "chain")
    assert run.status == "failed"
    assert run.failure is not None
    assert (run.failure.code, run.failure.message) == ("task_error", "and so")
    assert run.failure.detail["type"] == "RuntimeError"
    trace = run.failure.detail["traceback"]
    assert "ValueError: no such thing" in trace
    assert "direct cause" in trace
    assert "tasks.py" in trace
    assert "guest" not in trace
    assert run.exit_code == 1


@pytest.mark.parametrize(
    ("task", "payload", "code", "says"),
    [
        ("exit", {"code": 3}, 3, "sys.exit"),
        ("exit", {"code": 0}, 0, "sys.exit"),
        ("hard-exit", {"code": 4}, 4, "exited with code 4"),
        ("hard-exit", {"code": 0}, 0, "before the task returned"),
        ("signal", {"number": 9}, None, "SIGKILL"),
        ("signal", {"number": 11}, None, "SIGSEGV"),
    ],
)
async def test_leaving_is_not_returning(
    helmr: AsyncClient, task: str, payload: dict[str, int], code: int | None, says: str
) -> None:
    run = await _run(helmr, task, payload)
    assert run.status == "failed"
    assert run.failure is not None
    assert run.failure.code == "task_exit"
    assert says in run.failure.message
    assert run.exit_code == code


@pytest.mark.parametrize(
    ("task", "payload", "code", "says"),
    [
        ("not-json", None, "output_invalid", "object"),
        ("wrong-type", None, "output_invalid", "total"),
        ("large", {"size": 17_000_000}, "output_too_large", "16 MiB"),
        ("recursion", None, "task_error", "recursion"),
    ],
)
async def test_what_a_task_returns_is_checked(
    helmr: AsyncClient, task: str, payload: dict[str, int] | None, code: str, says: str
) -> None:
    run = await _run(helmr, task, payload)
    assert run.failure is not None
    assert run.failure.code == code
    assert says in run.failure.message


async def test_the_largest_output_that_fits_arrives_whole(helmr: AsyncClient) -> None:
    run = await _run(helmr, "large", {"size": 512 * 1024 - 2})
    assert run.status == "succeeded"
    assert run.output == "x" * (512 * 1024 - 2)


async def test_a_run_that_takes_too_long_is_ended(helmr: AsyncClient) -> None:
    run = await _run(helmr, "slow", {"seconds": 60})
    assert run.failure is not None
    assert run.failure.code == "max_duration"
    assert run.failure.detail["limit_seconds"] == 5
    assert 4.5 < run.active_seconds < 8
    assert (await written(helmr, run))["stdout"] == b"begun\n"


@pytest.mark.parametrize(
    ("payload", "path"),
    [(None, "payload"), ({}, "name"), ({"name": 5}, "name"), ({"name": "Ada", "times": "3"}, "times"), ([], "payload")],
)
async def test_a_payload_that_does_not_fit_makes_no_run(helmr: AsyncClient, payload: Any, path: str) -> None:
    with pytest.raises(PayloadInvalid, match=path) as refused:
        await helmr.sessions.start("greet", payload)
    assert "helmr task get greet" in (refused.value.hint or "")


async def test_an_unknown_task_is_refused_with_the_nearest_name(helmr: AsyncClient) -> None:
    with pytest.raises(NotFound, match="gret") as refused:
        await helmr.sessions.start("gret", {"name": "Ada"})
    assert refused.value.hint == "did you mean greet?"
    with pytest.raises(NotFound) as refused:
        await helmr.sessions.start("qqqqq")
    assert "greet" in (refused.value.hint or "")


@pytest.mark.parametrize("duration", [4.9, 86_401, "2d", 0])
async def test_a_duration_out_of_range_is_refused(helmr: AsyncClient, duration: Any) -> None:
    with pytest.raises(UsageError, match="out of range"):
        await helmr.sessions.start("nothing", max_duration=duration)


@pytest.mark.parametrize(
    "options",
    [
        {"tags": ["x"] * 11},
        {"tags": ["x" * 129]},
        {"metadata": {"a": "x" * 256 * 1024}},
        {"external_id": ""},
        {"external_id": "x" * 513},
        {"concurrency_key": ""},
        {"ttl": 0},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_what_exceeds_a_limit_is_refused(helmr: AsyncClient, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        await helmr.sessions.start("nothing", **options)


async def test_waiting_can_be_limited(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("slow", {"seconds": 1})
    with pytest.raises(TimedOut):
        await started.run.wait(timeout=0.2)
    assert (await started.run.wait(timeout=30)).status == "succeeded"


async def test_a_run_nobody_knows_is_not_found(helmr: AsyncClient) -> None:
    for ask in (helmr.runs.get, helmr.runs.cancel):
        with pytest.raises(Exception, match=r"no run|projector"):
            await ask("run_" + "0" * 24)


async def test_many_runs_at_once_all_end(helmr: AsyncClient) -> None:
    started = await asyncio.gather(*(helmr.sessions.start("async", {"n": n}) for n in range(24)))
    runs = await asyncio.gather(*(each.run.wait(timeout=60) for each in started))
    assert [run.output for run in runs] == [{"n": n} for n in range(24)]
    assert len({run.workspace_id for run in runs}) == 24
