"""kill -9 of the NATS server in the middle of everything: nothing acknowledged is missing, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from bus import topology
from helmr.client import AsyncClient, RunHandle
from tests.integration.platform import Platform, history, running, until, written

pytestmark = pytest.mark.anyio

TASKS = """
    import sys, time
    from helmr import logger, metadata, streams, task

    report = streams.output("report")

    @task("talk")
    def talk(payload: dict) -> int:
        for n in range(payload["lines"]):
            print(f"out {n}", flush=True)
            print(f"err {n}", file=sys.stderr, flush=True)
            logger.info(f"log {n}")
            time.sleep(payload["pause"])
        return payload["lines"]

    @task("tell")
    def tell(payload: dict) -> int:
        for n in range(payload["records"]):
            report.append(n)
            metadata.set("n", n)
            time.sleep(payload["pause"])
        return payload["records"]

    @task("quick")
    def quick(payload: dict) -> int:
        return payload["n"]

    @task("sleep")
    def sleep():
        time.sleep(60)
"""


async def _kill(platform: Platform, *, times: int = 1, pause: float = 0.5) -> None:
    for _ in range(times):
        await asyncio.sleep(pause)
        pid = platform.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while platform.server.pid == pid:  # noqa: ASYNC110  # the server's keeper tells nobody
                await asyncio.sleep(0.02)


async def test_logs_are_whole_and_followed_byte_for_byte(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("talk", {"lines": 600, "pause": 0.002})
        await until(helmr, started.run, "started")
        following = asyncio.create_task(written(helmr, started.run, follow=True))
        await _kill(platform, times=2)
        run = await started.run.wait(timeout=60)
        assert (run.status, run.output, run.dispatch_attempt) == ("succeeded", 600, 1)
        followed = await following
        assert followed == await written(helmr, run)
        assert followed["stdout"] == b"".join(b"out %d\n" % n for n in range(600))
        assert followed["stderr"] == b"".join(b"err %d\n" % n for n in range(600))
        assert followed["log"].count(b"\n") == 600
        totals = (await history(helmr, run))[-1].data["logs"]
        assert totals == {name: len(data) for name, data in followed.items()} | {"truncated": False}


async def test_records_and_metadata_are_neither_lost_nor_doubled(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("tell", {"records": 60, "pause": 0.03})
        await until(helmr, started.run, "started")
        await _kill(platform, times=2)
        run = await started.run.wait(timeout=60)
        assert (run.status, run.dispatch_attempt, run.metadata) == ("succeeded", 1, {"n": 59})
        told = [event.data["sequence"] for event in await history(helmr, run) if event.kind == "output"]
        assert told == list(range(1, 61))


async def test_events_are_followed_without_a_gap(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("tell", {"records": 40, "pause": 0.03})

        async def follow() -> list[int]:
            return [event.cursor async for event in started.run.events()]

        following = asyncio.create_task(follow())
        await _kill(platform, pause=0.7)
        run = await started.run.wait(timeout=60)
        assert await following == list(range(1, run.cursor + 1))


async def test_starts_that_are_under_way_are_made_once(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("acme", TASKS)

        async def start(n: int) -> RunHandle:
            await asyncio.sleep(n * 0.03)
            return (await helmr.sessions.start("quick", {"n": n}, external_id=f"x{n}")).run

        starting = asyncio.gather(*(start(n) for n in range(30)))
        await _kill(platform, pause=0.4)
        handles = await starting
        runs = await asyncio.gather(*(handle.wait(timeout=60) for handle in handles))
        assert [run.output for run in runs] == list(range(30))
        for run in runs:
            await history(helmr, run)


async def _everybody_is_known(platform: Platform) -> None:
    ids = {worker.id for worker in platform.workers}
    async with asyncio.timeout(topology.PRESENCE_TTL + 10):
        while set(platform.control.presence.alive()) != ids:  # noqa: ASYNC110  # a matter of time passing
            await asyncio.sleep(0.1)


async def test_afterwards_everything_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2) as platform:
        helmr = await platform.project("acme", TASKS)
        before = await (await helmr.sessions.start("quick", {"n": 1})).run.wait(timeout=20)
        sleeping = await helmr.sessions.start("sleep")
        await until(helmr, sleeping.run, "started")
        await _kill(platform)
        await asyncio.sleep(topology.ACK_WAIT + topology.HEARTBEAT)
        await _everybody_is_known(platform)
        again = await (await helmr.sessions.start("quick", {"n": 2}, workspace=before.workspace_id)).run.wait(
            timeout=20
        )
        assert (again.output, again.dispatch_attempt) == (2, 1)
        assert (await history(helmr, again))[0].data["lane"].startswith("@wrk_")
        run = await helmr.runs.get(sleeping.run)
        assert (run.status, run.dispatch_attempt) == ("running", 1), "nobody took it from a living worker"
        await sleeping.run.cancel()
        assert (await sleeping.run.wait(timeout=20)).status == "cancelled"


async def test_an_outage_longer_than_every_deadline_costs_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, workers=2) as platform:
        helmr: AsyncClient = await platform.project("acme", TASKS)
        sleeping = await helmr.sessions.start("sleep")
        await until(helmr, sleeping.run, "started")
        pid = platform.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(topology.ACK_WAIT + topology.HEARTBEAT)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(topology.ACK_WAIT + topology.HEARTBEAT)
        await _everybody_is_known(platform)
        run = await helmr.runs.get(sleeping.run)
        assert (run.status, run.dispatch_attempt) == ("running", 1)
        await sleeping.run.cancel(force=True)
        assert (await sleeping.run.wait(timeout=20)).status == "cancelled"
