"""A NATS client that Helmr did not write: it hears every event of every run, in order."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import nats
import pytest
from nats.aio.msg import Msg

from helmr.client import AsyncClient
from tests.integration.platform import Platform, history

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import metadata, streams, task

    report = streams.output("report")

    @task("tell")
    def tell(payload: dict):
        for n in range(payload["n"]):
            metadata.set("n", n)
            report.append(n)

    @task("fail")
    def fail():
        raise ValueError("no")
"""

_KEYS = {"cursor", "id", "run_id", "kind", "at", "attempt", "dispatch_attempt", "source", "message", "data"}


async def test_it_hears_every_event_in_order(helmr: AsyncClient, platform: Platform) -> None:
    heard: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    subjects: defaultdict[str, list[str]] = defaultdict(list)

    async def hear(msg: Msg) -> None:
        _, _, project, environment, entity, run_id, *kind = msg.subject.split(".")
        assert (project, environment, entity) == ("subscription", "test", "run")
        heard[run_id].append(json.loads(msg.data))
        subjects[run_id].append(".".join(kind))

    client = await nats.connect(platform.server.url)
    await client.subscribe("helmr.event.subscription.test.run.>", cb=hear)
    await client.flush()
    starts = [helmr.sessions.start("tell", {"n": n}) for n in range(6)] + [helmr.sessions.start("fail")]
    started = await asyncio.gather(*starts)
    runs = await asyncio.gather(*(each.run.wait(timeout=30) for each in started))
    await client.flush()
    for run in runs:
        events = heard[run.id]
        assert [event["cursor"] for event in events] == list(range(1, run.cursor + 1))
        assert all(set(event) >= _KEYS for event in events)
        stored = await history(helmr, run)
        assert [(event["id"], event["kind"]) for event in events] == [(event.id, event.kind) for event in stored]
        assert [event["data"] for event in events] == [event.data for event in stored]
    told = subjects[runs[-1].id]
    assert told == ["queued.default.0", "leased", "started", "failed"]
    assert "journal" in subjects[runs[3].id]
    await client.close()


async def test_it_may_choose_one_kind_of_every_run(helmr: AsyncClient, platform: Platform) -> None:
    client = await nats.connect(platform.server.url)
    failed = await client.subscribe("helmr.event.subscription.test.run.*.failed")
    await client.flush()
    good, bad = await helmr.sessions.start("tell", {"n": 0}), await helmr.sessions.start("fail")
    await asyncio.gather(good.run.wait(timeout=30), bad.run.wait(timeout=30))
    event = json.loads((await failed.next_msg(timeout=5)).data)
    assert (event["run_id"], event["kind"]) == (bad.run.id, "failed")
    assert event["data"]["failure"]["code"] == "task_error"
    with pytest.raises(nats.errors.TimeoutError):
        await failed.next_msg(timeout=0.2)
    await client.close()


async def test_sessions_and_workspaces_are_told_too(helmr: AsyncClient, platform: Platform) -> None:
    client = await nats.connect(platform.server.url)
    heard: list[str] = []

    async def hear(msg: Msg) -> None:
        heard.append(".".join(msg.subject.split(".")[4::2]))

    for entity in ("session", "workspace"):
        await client.subscribe(f"helmr.event.subscription.test.{entity}.>", cb=hear)
    await client.flush()
    await (await helmr.sessions.start("tell", {"n": 0})).run.wait(timeout=30)
    await client.flush()
    assert sorted(heard) == ["session.opened", "workspace.created", "workspace.materialized"]
    await client.close()
