"""Ending a run before its time: queued, preparing, running, stubborn, and again."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from helmr.errors import Conflict
from tests.integration.platform import history, kinds, running, until, written
from worker.engine import BuildSecrets, ImageSpec, Progress
from worker.process_engine import ProcessEngine

pytestmark = pytest.mark.anyio

TASKS = """
    import asyncio, os, signal, subprocess, sys, time
    from helmr import Queue, Retry, task, timers

    narrow = Queue("narrow", concurrency=1)

    @task("sleep")
    def sleep():
        print(os.getpid(), flush=True)
        time.sleep(60)

    @task("polite")
    def polite():
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)

    @task("async")
    async def asynchronous():
        try:
            print("begun", flush=True)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise

    @task("asks")
    def asks(ctx):
        print("begun", flush=True)
        try:
            while not ctx.cancelled:
                time.sleep(0.05)
        except BaseException as error:
            print(type(error).__name__, flush=True)
            raise

    @task("stubborn", cancel_grace=1)
    def stubborn():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", deaf])
        print(child.pid, flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass

    @task("very-stubborn", cancel_grace=60)
    def very_stubborn():
        stubborn.fn()

    @task("quick")
    def quick():
        return 1

    @task("held", queue=narrow)
    def held():
        print(os.getpid(), flush=True)
        time.sleep(60)

    @task("waiting")
    def waiting():
        print(os.getpid(), flush=True)
        timers.sleep("1h")

    @task("retry_scheduled", retry=Retry(max_attempts=2, min_delay="60s", max_delay="60s", jitter=False))
    def retry_scheduled():
        print(os.getpid(), flush=True)
        raise ValueError("soon")
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _begun(helmr: AsyncClient, task: str) -> tuple[str, bytes]:
    """The id of a run of ``task`` that has written something, and what."""
    started = await helmr.sessions.start(task)
    async for chunk in started.run.logs():
        return started.run.id, chunk.data
    raise AssertionError("it ended without a word")


@pytest.mark.parametrize(
    ("task", "last_words"),
    [("polite", b"begun\ncleaned up\n"), ("async", b"begun\ncancelled\n"), ("asks", b"begun\nCancelled\n")],
)
async def test_a_task_hears_of_it_and_may_clean_up(helmr: AsyncClient, task: str, last_words: bytes) -> None:
    run_id, _ = await _begun(helmr, task)
    asked = time.monotonic()
    answered = await helmr.runs.cancel(run_id, reason="enough")
    assert answered.cancel_requested is not None
    run = await helmr.runs.wait(run_id, timeout=20)
    assert time.monotonic() - asked < 3
    assert (run.status, run.failure) == ("cancelled", None)
    assert (await written(helmr, run))["stdout"] == last_words
    events = await history(helmr, run)
    assert [event.kind for event in events] == ["queued", "leased", "started", "cancel_requested", "cancelled"]
    assert events[-1].data["reason"] == events[-2].data["reason"] == "enough"
    assert (await helmr.sessions.get(run.session_id)).status == "open"


async def test_a_stubborn_tree_is_killed_after_its_grace(helmr: AsyncClient) -> None:
    run_id, child = await _begun(helmr, "stubborn")
    asked = time.monotonic()
    await helmr.runs.cancel(run_id)
    run = await helmr.runs.wait(run_id, timeout=20)
    assert 0.9 < time.monotonic() - asked < 6
    assert run.status == "cancelled"
    assert not _alive(int(child))


@pytest.mark.parametrize("polite_first", [False, True])
async def test_force_skips_the_grace(helmr: AsyncClient, polite_first: bool) -> None:
    run_id, child = await _begun(helmr, "very-stubborn")
    if polite_first:
        await helmr.runs.cancel(run_id)
        await asyncio.sleep(0.2)
    asked = time.monotonic()
    await helmr.runs.cancel(run_id, force=True)
    run = await helmr.runs.wait(run_id, timeout=20)
    assert time.monotonic() - asked < 5
    assert run.status == "cancelled"
    assert not _alive(int(child))


async def test_asking_twice_is_said_once(helmr: AsyncClient) -> None:
    run_id, _ = await _begun(helmr, "stubborn")
    await asyncio.gather(*(helmr.runs.cancel(run_id, reason=str(n)) for n in range(4)))
    await helmr.runs.wait(run_id, timeout=20)
    assert (await kinds(helmr, run_id)).count("cancel_requested") == 1


async def test_what_has_ended_cannot_be_cancelled(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("quick")
    await started.run.wait(timeout=20)
    with pytest.raises(Conflict, match="succeeded already") as refused:
        await started.run.cancel(force=True)
    assert refused.value.details["status"] == "succeeded"


async def test_cancelling_a_session_cancels_its_run(helmr: AsyncClient) -> None:
    run_id, _ = await _begun(helmr, "sleep")
    run = await helmr.runs.get(run_id)
    session = await helmr.sessions.cancel(run.session_id, reason="over")
    assert (session.status, session.reason) == ("cancelled", "over")
    assert (await helmr.runs.wait(run_id, timeout=20)).status == "cancelled"
    assert (await helmr.sessions.cancel(run.session_id)).status == "cancelled"


async def test_a_queued_run_ends_at_once_and_never_begins(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("quick", ttl="1h")
        run = await started.run.cancel(reason="changed my mind")
        assert run.status == "cancelled"
        assert (run.attempt, run.started_at) == (None, None)
        await platform.add_worker()
        after = await helmr.sessions.start("quick")
        await after.run.wait(timeout=20)
        assert await kinds(helmr, started.run) == ["queued", "cancelled"]


class _SlowImages(ProcessEngine):
    """An engine that builds for ever."""

    building = asyncio.Event()

    async def ensure_image(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:
        progress("building")
        self.building.set()
        await asyncio.sleep(3600)
        return await super().ensure_image(spec, progress, secrets)


async def test_a_run_whose_workspace_is_being_prepared_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.integration.platform.ProcessEngine", _SlowImages)
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("quick")
        await until(helmr, started.run, "leased")
        await _SlowImages.building.wait()
        asked = time.monotonic()
        await started.run.cancel()
        run = await started.run.wait(timeout=20)
        assert time.monotonic() - asked < 2
        assert run.status == "cancelled"
        assert b"building" in (await written(helmr, run))["log"]
        limited = await helmr.sessions.start("quick", max_duration=5)
        over = await limited.run.wait(timeout=20)
        assert over.failure is not None
        assert over.failure.code == "max_duration"
        assert "prepared" in over.failure.message
        workspace = await helmr.workspaces.get(run.workspace_id)
        assert workspace.state == "stopped"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["held", "waiting", "retry_scheduled"])
async def test_what_nothing_executes_ends_at_once_and_leaves_no_process(
    helmr: AsyncClient, kind: str, *, force: bool
) -> None:
    before = await _begun(helmr, "held") if kind == "held" else None
    started = await helmr.sessions.start(kind)
    await until(helmr, started.run, kind)
    run = await started.run.cancel(reason="enough", force=force)
    assert (run.status, run.cancel_requested) == ("cancelled", None)
    assert (await history(helmr, run))[-1].data["reason"] == "enough"
    with pytest.raises(Conflict, match="cancelled already"):
        await started.run.cancel()
    if before is not None:
        await helmr.runs.cancel(before[0], force=True)
        assert (await helmr.runs.wait(before[0], timeout=20)).status == "cancelled"
        assert await kinds(helmr, run) == ["held", "cancelled"], "its turn has come, and nobody takes it"
        return
    pid = int((await written(helmr, run))["stdout"])
    async with asyncio.timeout(10):
        while _alive(pid):  # noqa: ASYNC110  # not our child: nobody tells
            await asyncio.sleep(0.02)
