"""What happens when time passes: retries after a delay, and runs that nobody starts in time."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from bus import timers
from bus.log import RUN
from bus.queueing import redispatch
from bus.stored import get_message
from helmr import events, ids, subjects
from helmr.client import AsyncClient
from helmr.models import Started
from helmr.subjects import Scope
from tests.integration.platform import Platform, history, kinds, running, until

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from pathlib import Path
    from helmr import Retry, task

    def _count() -> int:
        counter = Path("count")
        seen = int(counter.read_text()) + 1 if counter.exists() else 1
        counter.write_text(str(seen))
        return seen

    @task("third-time", retry=Retry(max_attempts=3, min_delay="300ms", jitter=False))
    def third_time(ctx) -> int:
        seen = _count()
        if seen < 3:
            raise ValueError(f"attempt {ctx.attempt}")
        return ctx.attempt

    @task("never", retry=Retry(max_attempts=2, min_delay=0, jitter=False))
    def never():
        raise ValueError("never")

    @task("only-exits", retry=Retry(max_attempts=3, min_delay=0, codes=["task_exit"]))
    def only_exits():
        raise ValueError("not an exit")

    @task("quick", ttl="2s")
    def quick():
        time.sleep(2.5)

    @task("long-retry", retry=Retry(max_attempts=2, min_delay="60s", max_delay="60s", jitter=False))
    def long_retry():
        raise ValueError("soon")
"""


async def test_a_failed_attempt_is_followed_by_others_after_their_delay(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("third-time")).run.wait(timeout=30)
    assert (run.status, run.output, run.attempt, run.dispatch_attempt) == ("succeeded", 3, 3, 1)
    told = await history(helmr, run)
    attempt = ["queued", "leased", "started", "retry_scheduled"]
    assert [event.kind for event in told] == [*attempt, *attempt, "queued", "leased", "started", "succeeded"]
    for scheduled, delay in zip([told[3], told[7]], (0.3, 0.6), strict=True):
        waited = (told[scheduled.cursor].at - scheduled.at).total_seconds()
        assert delay - 0.01 <= waited < delay + 1.5
        assert scheduled.data["failure"]["code"] == "task_error"
    assert [event.data["cause"] for event in told if event.kind == "queued"] == ["start", "retry", "retry"]


async def test_when_the_attempts_are_used_up_the_run_fails(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("never")).run.wait(timeout=30)
    assert run.failure is not None
    assert (run.failure.code, run.attempt) == ("task_error", 2)
    assert (await kinds(helmr, run)).count("retry_scheduled") == 1


async def test_a_policy_may_name_what_it_retries(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("only-exits")).run.wait(timeout=30)
    assert (run.status, run.attempt) == ("failed", 1)


async def test_a_run_between_two_attempts_can_be_cancelled(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("long-retry")
    await until(helmr, started.run, "retry_scheduled")
    run = await started.run.cancel()
    assert (run.status, run.attempt) == ("cancelled", 1)


async def test_a_run_nobody_takes_expires(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("long-retry", ttl="500ms")
        run = await started.run.wait(timeout=10)
        assert (run.status, run.ttl, run.attempt) == ("expired", 0.5, None)
        told = await history(helmr, run)
        assert [event.kind for event in told] == ["queued", "expired"]
        assert 0.4 < (told[1].at - told[0].at).total_seconds() < 2
        await platform.add_worker()
        other = await (await helmr.sessions.start("never")).run.wait(timeout=30)
        assert other.status == "failed"
        assert await kinds(helmr, run) == ["queued", "expired"]


async def test_a_run_that_began_in_time_does_not_expire(helmr: AsyncClient, platform: Platform) -> None:
    started = await helmr.sessions.start("quick")
    run = await started.run.wait(timeout=30)
    assert (run.status, run.ttl) == ("succeeded", 2.0)
    due = await _messages(platform, f"helmr.*.{Scope(*helmr.scope)}.run.{run.id}.ttl")
    assert due == [], "the lease takes the timer away"


async def test_the_timer_goes_as_well_when_the_run_was_moved_to_another_lane_first(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("only-exits", ttl="1h")
        scope, run_id = Scope(*helmr.scope), started.run.id
        assert len(await _messages(platform, f"helmr.*.{scope}.run.{run_id}.ttl")) == 1
        await redispatch(platform.control.log, scope, run_id, dispatch=1, lane="default")
        await platform.add_worker()
        assert (await started.run.wait(timeout=30)).status == "failed"
        assert await _messages(platform, f"helmr.*.{scope}.run.{run_id}.ttl") == []


async def test_a_repeated_start_arms_no_timer_that_its_run_is_done_with(helmr: AsyncClient, platform: Platform) -> None:
    body = {"task": "only-exits", "request_id": ids.new("req"), "ttl": 3600.0}
    first = await helmr.wire.call("session", "start", body, Started)
    await helmr.runs.wait(first.run, timeout=30)
    again = await helmr.wire.call("session", "start", body, Started)
    assert again.run.id == first.run.id
    assert await _messages(platform, f"helmr.*.{Scope(*helmr.scope)}.run.{first.run.id}.ttl") == []


async def _messages(platform: Platform, subject: str) -> list[str]:
    info = await platform.nc.jetstream().stream_info("RUNS", subjects_filter=subject)
    return list(info.state.subjects or {})


@pytest.mark.parametrize("what", ["ttl", "retry", "unheard-of"])
async def test_a_timer_nobody_needs_fires_into_the_void(helmr: AsyncClient, platform: Platform, what: str) -> None:
    run = await (await helmr.sessions.start("only-exits")).run.wait(timeout=30)
    scope = Scope(*helmr.scope)
    await timers.arm(platform.control.log, scope, run.id, what, events.now())
    await timers.arm(platform.control.log, scope, "run_" + "0" * 24, what, events.now())
    await asyncio.sleep(0.5)
    assert (await platform.control.log.present(RUN, scope, run.id)).cursor == run.cursor
    after = await (await helmr.sessions.start("never")).run.wait(timeout=30)
    assert after.attempt == 2, "the reactors go on"


async def test_a_timer_armed_again_fires_once_and_later(helmr: AsyncClient, platform: Platform) -> None:
    scope, run_id = Scope(*helmr.scope), "run_" + "1" * 24
    begun, log = events.now(), platform.control.log
    js = log.js
    for seconds in (0.5, 1.2):
        await timers.arm(log, scope, run_id, "ttl", begun + timedelta(seconds=seconds))
    await asyncio.sleep(2)
    found = await get_message(js, "RUNS", subjects.due(scope, run_id, "ttl"), after=0)
    assert found is not None
    fired = await js.get_msg("RUNS", seq=found[0])
    assert fired.time is not None
    assert (fired.time - begun).total_seconds() > 1.1
    assert await get_message(js, "RUNS", subjects.due(scope, run_id, "ttl"), after=found[0]) is None


async def test_a_message_that_means_nothing_does_not_stop_the_reactors(helmr: AsyncClient, platform: Platform) -> None:
    js = platform.nc.jetstream()
    for subject in (
        "helmr.due.x",
        "helmr.due.a.b.run.c d.ttl".replace(" ", "\u00e9"),
        "helmr.ev.a.b.run.c.retry_scheduled",
    ):
        await js.publish(subject, b"no event")
    run = await (await helmr.sessions.start("never")).run.wait(timeout=30)
    assert run.attempt == 2
