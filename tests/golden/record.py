"""Records the histories of this release: every kind of life is lived once, and its events are kept as they were stored.

    .venv/bin/python -m tests.golden.record

Writes ``tests/golden/VERSION/NAME.jsonl``, a line ``{"entity", "event"}`` for each event of a life, in the order of the log.
Run it once for each release; a history that was released is never written again.
"""

from __future__ import annotations

import os

os.environ.setdefault("HELMR_TEST_PACE", "0.4")

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats.js.errors

from bus import topology
from bus.log import RUN
from helmr import ids, subjects
from helmr.client import AsyncClient
from helmr.client.sessions import Started
from helmr.reducers import run as rules
from helmr.subjects import Scope
from helmr.version import __version__
from tests.integration.platform import Platform, running, until

FOLDER = Path(__file__).parent
TASKS = """
    import time
    from helmr import Queue, Retry, Sandbox, metadata, step, streams, task, timers, tokens

    approval = streams.input("approval")
    report = streams.output("report")
    narrow = Queue("narrow", concurrency=1)

    @task("work")
    def work(payload):
        metadata.set("phase", "working")
        step("fetch", lambda: {"n": 1})
        report.append({"n": 1})
        return payload

    @task("fail", retry=Retry(max_attempts=2, min_delay="0s"))
    def fail():
        raise ValueError("no")

    @task("sleep")
    def sleep():
        time.sleep(600)

    @task("wait", park_after="0s")
    def wait():
        timers.sleep("1s")
        token = tokens.create(timeout="1h")
        metadata.set("token", token.id)
        return [token.wait(), approval.wait()]

    @task("large", sandbox=Sandbox("large", memory="1GiB"))
    def large():
        return 1

    @task("narrow", queue=narrow)
    def narrowed():
        return 1
"""


class Lives:
    """The lives, by name; each returns its start."""

    def __init__(self, platform: Platform, client: AsyncClient) -> None:
        self.platform = platform
        self.client = client

    def all(self) -> dict[str, Callable[[], Awaitable[Started]]]:
        """By the names of their files."""
        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "cancelled-queued": self.cancelled_queued,
            "cancelled-running": self.cancelled_running,
            "expired": self.expired,
            "lost": self.lost,
            "waited": self.waited,
            "held": self.held,
            "session-expired": self.session_expired,
            "workspace-updated": self.workspace_updated,
        }

    async def succeeded(self) -> Started:
        """From the start to a closed session."""
        started = await self.client.sessions.start("work", {"a": [1, None]}, external_id="one", tags=["t"])
        await started.run.wait(timeout=30)
        await self.client.sessions.close(started.session)
        return started

    async def failed(self) -> Started:
        """Two attempts."""
        started = await self.client.sessions.start("fail")
        await started.run.wait(timeout=30)
        return started

    async def cancelled_queued(self) -> Started:
        """Nobody may take it."""
        started = await self._unleased("sleep", ttl="1h")
        await started.run.cancel(reason="enough")
        return started

    async def cancelled_running(self) -> Started:
        """By way of its session."""
        started = await self.client.sessions.start("sleep")
        await until(self.client, started.run, "started")
        await self.client.sessions.cancel(started.session, reason="enough")
        await started.run.wait(timeout=30)
        return started

    async def expired(self) -> Started:
        """Not leased in time."""
        started = await self._unleased("sleep", ttl="1s")
        await started.run.wait(timeout=30)
        return started

    async def lost(self) -> Started:
        """Five workers that nobody has heard of."""
        started = await self._unleased("sleep")
        log, scope = self.platform.control.log, Scope(*self.client.scope)
        for number in range(1, rules.MAX_DISPATCH_ATTEMPTS + 1):
            await until(self.client, started.run, "queued", count=number)
            await log.transact(
                RUN,
                scope,
                started.run.id,
                lambda state: rules.lease(state, worker=ids.new("wrk"), dispatch=state.dispatch or 0),
            )
        await started.run.wait(timeout=60)
        return started

    async def waited(self) -> Started:
        """For a timer, a token and a record, by replay."""
        started = await self.client.sessions.start("wait")
        await until(self.client, started.run, "waiting", count=2)
        token = (await self.client.runs.get(started.run)).metadata["token"]
        await self.client.tokens.complete(token, {"yes": True})
        await until(self.client, started.run, "waiting", count=3)
        await self.client.sessions.open(started.session).input("approval").send({"ok": 1})
        await started.run.wait(timeout=30)
        return started

    async def held(self) -> Started:
        """Behind another run of its queue."""
        first = await self.client.sessions.start("narrow")
        started = await self.client.sessions.start("narrow")
        await first.run.wait(timeout=30)
        await started.run.wait(timeout=30)
        return started

    async def session_expired(self) -> Started:
        """With its run."""
        started = await self.client.sessions.start("sleep", expires_in="2s")
        await started.run.wait(timeout=30)
        return started

    async def workspace_updated(self) -> Started:
        """What is said of it, and then its sandbox."""
        started = await self.client.sessions.start("work", {"a": 1})
        await started.run.wait(timeout=30)
        workspace = started.session.workspace_id
        await self.client.workspaces.update(workspace, tag=["one", "two"], metadata={"owner": "ada", "n": 1})
        await self.client.workspaces.update(workspace, untag=["one"], metadata={"n": None}, task="large")
        return started

    async def _unleased(self, task: str, **options: Any) -> Started:
        """A run in a platform without workers."""
        for worker in list(self.platform.workers):
            await self.platform.stop_worker(worker)
        return await self.client.sessions.start(task, **options)


async def record(folder: Path) -> None:
    """Live all lives, each in a project of its own, and write them down."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as home:
        for name in Lives.all(Lives.__new__(Lives)):
            async with running(Path(home) / name) as platform:
                client = await platform.project(name, TASKS)
                started = await Lives(platform, client).all()[name]()
                await asyncio.sleep(topology.HEARTBEAT)  # the machine of its workspace may still be told of
                write(folder / f"{name}.jsonl", await stored(platform, started))


async def stored(platform: Platform, started: Started) -> list[dict[str, Any]]:
    """What the log has of a life."""
    js = platform.nc.jetstream()
    info = await js.stream_info(topology.RUNS)
    found = []
    for seq in range(info.state.first_seq, info.state.last_seq + 1):
        with contextlib.suppress(nats.js.errors.NotFoundError):  # a timer that has fired
            message = await js.get_msg(topology.RUNS, seq=seq)
            if (message.subject or "").startswith("helmr.ev."):
                parsed = subjects.parse_event(message.subject or "")
                if parsed.entity != "queue":  # of a queue the log keeps the latest event only
                    found.append({"entity": parsed.entity, "event": json.loads(message.data or b"")})
    if not any(line["event"].get("run_id") == started.run.id for line in found):
        raise SystemExit(f"run {started.run.id} has left no trace")
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """One life, one file."""
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


if __name__ == "__main__":
    asyncio.run(record(FOLDER / __version__))
