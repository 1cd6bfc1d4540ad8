"""Starting sessions: external ids, repeated requests, and what a half-done start leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import requests, topology
from bus.log import RUN, SESSION, WORKSPACE, Position
from bus.starts import StartRequest
from bus.stored import get_message
from helmr import ids, subjects
from helmr.client import AsyncClient, Client
from helmr.errors import Conflict, HelmrError, NotFound, UsageError
from helmr.events import Draft
from helmr.models import Session, Started
from helmr.subjects import Scope, api, timer
from tests.integration.platform import Platform, history, kinds, until

pytestmark = pytest.mark.anyio

TASKS = """
    import time
    from helmr import Sandbox, task

    other = Sandbox("other", workspace="/other")

    @task("quick")
    def quick(payload: dict) -> dict:
        return payload

    @task("slow")
    def slow():
        time.sleep(3)

    @task("endless")
    def endless():
        time.sleep(600)

    @task("elsewhere", sandbox=other)
    def elsewhere():
        pass

    @task("boxed", sandbox=Sandbox("box", cpu=1, memory="512MiB"))
    def boxed():
        pass
"""


def _request(**changes: Any) -> dict[str, Any]:
    return {"task": "quick", "request_id": ids.new("req"), "payload": {"n": 1}} | changes


async def _start(helmr: AsyncClient, body: dict[str, Any]) -> Started:
    return await helmr.wire.call("session", "start", body, Started)


async def test_the_same_external_id_gives_the_same_session(helmr: AsyncClient) -> None:
    first = await helmr.sessions.start("quick", {"n": 1}, external_id="pr-1")
    assert not first.reused
    again = await helmr.sessions.start("quick", {"n": 1}, external_id="pr-1")
    assert again.reused
    assert (again.session.id, again.run.id) == (first.session.id, first.run.id)
    await first.run.wait(timeout=20)
    ended = await helmr.sessions.start("quick", {"n": 1}, external_id="pr-1")
    assert (ended.reused, ended.run.record.status, ended.run.record.output) == (True, "succeeded", {"n": 1})
    assert (await kinds(helmr, first.run)).count("queued") == 1


@pytest.mark.parametrize("change", [{"payload": {"n": 2}}, {"task": "slow", "payload": None}, {"tags": ["x"]}])
async def test_an_external_id_belongs_to_one_start(helmr: AsyncClient, change: dict[str, Any]) -> None:
    name = f"pr-{sorted(change)}"
    await _start(helmr, _request(external_id=name))
    with pytest.raises(Conflict, match="started differently"):
        await _start(helmr, _request(external_id=name) | change)


async def test_starts_at_the_same_time_with_one_external_id_make_one_session(helmr: AsyncClient) -> None:
    started = await asyncio.gather(*(helmr.sessions.start("quick", {"n": 1}, external_id="race") for _ in range(12)))
    assert len({each.session.id for each in started}) == 1
    assert len({each.run.id for each in started}) == 1
    assert [each.reused for each in started].count(False) == 1
    await started[0].run.wait(timeout=20)
    assert await kinds(helmr, started[0].run) == ["queued", "leased", "started", "succeeded"]


@pytest.mark.parametrize("external_id", [None, "retried"])
async def test_a_request_sent_again_makes_one_run(helmr: AsyncClient, external_id: str | None) -> None:
    body = _request(external_id=external_id)
    started = await asyncio.gather(*(_start(helmr, body) for _ in range(6)))
    assert len({each.run.id for each in started}) == 1
    assert len({each.session.workspace_id for each in started}) == 1
    await helmr.runs.wait(started[0].run.id, timeout=20)
    again = await _start(helmr, body)
    assert (again.run.id, again.run.status) == (started[0].run.id, "succeeded")
    assert await kinds(helmr, again.run.id) == ["queued", "leased", "started", "succeeded"]


@pytest.mark.parametrize(
    ("stored", "external_id"),
    [
        ((), None),
        (("session",), None),
        (("workspace",), None),
        (("session", "workspace"), None),
        (("session",), "half"),
        (("session", "workspace"), "half"),
    ],
)
async def test_a_start_that_was_interrupted_is_completed_by_its_repetition(
    helmr: AsyncClient, platform: Platform, stored: tuple[str, ...], external_id: str | None
) -> None:
    scope = Scope(*helmr.scope)
    name = external_id and f"{external_id}-{len(stored)}"
    body = _request(external_id=name)
    request = msgspec.convert(body, StartRequest)
    plan = await platform.control.sessions.planner.plan(scope, request)
    log = platform.control.log
    if "session" in stored:
        await log.append(SESSION, scope, plan.session_id, Position(0, None), plan.session)
    if "workspace" in stored:
        assert plan.workspace is not None
        await log.append(WORKSPACE, scope, plan.workspace_id, Position(0, None), plan.workspace)
    again = body | ({"request_id": ids.new("req")} if name else {})
    started = await _start(helmr, again)
    assert (started.session.id, started.run.id) == (plan.session_id, plan.run_id)
    assert started.session.workspace_id == plan.workspace_id
    assert (await helmr.runs.wait(plan.run_id, timeout=20)).status == "succeeded"
    assert (await log.last(RUN, scope, plan.run_id)).state.workspace_id == plan.workspace_id


async def test_a_session_is_closed_when_nothing_runs(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("slow")
    with pytest.raises(Conflict, match="active run"):
        await helmr.sessions.close(started.session)
    await until(helmr, started.run, "leased")
    assert (await helmr.sessions.get(started.session)).activity == "running"
    await started.run.wait(timeout=20)
    closed = await helmr.sessions.close(started.session)
    assert (closed.status, closed.activity) == ("closed", "idle")
    assert (await helmr.sessions.close(started.session)).status == "closed"


async def _ended(helmr: AsyncClient, session: Session) -> Session:
    """The session when it is open no more."""
    async with asyncio.timeout(20):
        while (found := await helmr.sessions.get(session)).status == "open":  # noqa: ASYNC110  # nobody follows sessions
            await asyncio.sleep(0.05)
    return found


async def test_a_session_expires_and_its_run_with_it(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("endless", external_id="short-lived", expires_in="1s")
    assert started.session.expires_at is not None
    assert (started.session.expires_at - started.session.created_at).total_seconds() == pytest.approx(1, abs=0.2)
    run = await started.run.wait(timeout=20)
    assert run.status == "cancelled"
    assert (await history(helmr, run))[-1].data["reason"] == "session expired"
    found = await _ended(helmr, started.session)
    assert (found.status, found.activity, found.reason) == ("expired", "idle", "session expired")
    again = await helmr.sessions.start("endless", external_id="short-lived", expires_in="1s")
    assert (again.reused, again.run.id, again.session.status) == (True, run.id, "expired")
    with pytest.raises(Conflict, match="expired"):
        await helmr.sessions.close(started.session)


async def test_an_idle_session_expires(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("quick", {"n": 1}, expires_in="2s")
    assert (await started.run.wait(timeout=20)).status == "succeeded"
    assert (await _ended(helmr, started.session)).status == "expired"


async def test_what_was_closed_does_not_expire(helmr: AsyncClient, platform: Platform) -> None:
    started = await helmr.sessions.start("quick", {"n": 1}, expires_in="1h")
    await started.run.wait(timeout=20)
    await helmr.sessions.close(started.session)
    scope = Scope(*helmr.scope)
    assert await get_message(platform.control.log.js, "RUNS", timer(scope, started.session.id, "session")) is None
    with pytest.raises(Conflict, match="closed already"):
        await platform.control.sessions.expire(scope, started.session.id)


@pytest.mark.parametrize("expires_in", [0, 0.5, "366d"])
async def test_an_expiry_out_of_range_is_refused(helmr: AsyncClient, expires_in: Any) -> None:
    with pytest.raises(UsageError, match="expire"):
        await helmr.sessions.start("quick", {"n": 1}, expires_in=expires_in)


async def test_a_workspace_that_does_not_fit_is_refused_before_anything_is_created(
    helmr: AsyncClient, platform: Platform
) -> None:
    first = await helmr.sessions.start("quick", {"n": 1})
    await first.run.wait(timeout=20)
    workspace = first.session.workspace_id
    before = await _entities(platform)
    with pytest.raises(Conflict, match=r"sandbox default \(the task needs other\); mount path /workspace \(the"):
        await helmr.sessions.start("elsewhere", workspace=workspace)
    with pytest.raises(NotFound):
        await helmr.sessions.start("quick", {"n": 1}, workspace="ws_" + "0" * 24)
    foreign = await platform.project("foreign", TASKS)
    with pytest.raises(NotFound, match="in foreign"):
        await foreign.sessions.start("quick", {"n": 1}, workspace=workspace)
    assert await _entities(platform) == before


async def _entities(platform: Platform) -> set[tuple[str, str]]:
    """Everything that the log has an event of."""
    info = await requests.api(platform.nc, f"STREAM.INFO.{topology.RUNS}", {"subjects_filter": subjects.ALL_EVENTS})
    parsed = map(subjects.parse_event, info["state"]["subjects"])
    return {(each.entity, each.id) for each in parsed}


async def test_a_workspace_fits_the_sandbox_as_it_was_when_it_was_made(platform: Platform) -> None:
    client = await platform.project("grown", TASKS)
    first = await client.sessions.start("boxed")
    await first.run.wait(timeout=20)
    workspace = first.session.workspace_id
    await client.sessions.start("boxed", workspace=workspace)
    grown = await platform.project(
        "grown", TASKS.replace('cpu=1, memory="512MiB"', 'cpu=2, memory="1GiB", network="none"')
    )
    with pytest.raises(Conflict) as refused:
        await grown.sessions.start("boxed", workspace=workspace)
    assert refused.value.details["differences"] == [
        "cpu 1 (the task needs 2)",
        "memory 512 MiB (the task needs 1 GiB)",
        "network internet (the task needs none)",
    ]


async def test_a_deleted_workspace_is_refused(helmr: AsyncClient, platform: Platform) -> None:
    first = await helmr.sessions.start("quick", {"n": 1})
    await first.run.wait(timeout=20)
    workspace = first.session.workspace_id
    await platform.control.log.transact(
        WORKSPACE, Scope(*helmr.scope), workspace, lambda _: Draft(kind="deleted", message="deleted")
    )
    with pytest.raises(Conflict, match="is deleted"):
        await helmr.sessions.start("quick", {"n": 1}, workspace=workspace)


@pytest.mark.parametrize(
    ("noun", "verb", "body"),
    [
        ("session", "start", {}),
        ("session", "start", {"task": "quick", "request_id": "no id"}),
        ("session", "start", {"task": "quick", "request_id": "req_" + "!" * 24}),
        ("session", "start", {"task": 5, "request_id": "req_" + "0" * 24}),
        ("session", "start", {"task": "quick", "request_id": "req_" + "0" * 24, "unknown": 1}),
        ("session", "start", {"task": "quick", "request_id": "req_" + "0" * 24, "workspace": "*"}),
        ("session", "start", {"task": "quick", "request_id": "req_" + "0" * 24, "ttl": -1}),
        ("run", "get", {"id": "*"}),
        ("run", "get", {"id": ">"}),
        ("run", "get", {"id": "a\r\nPUB x 0\r\n\r\n"}),
        ("run", "get", {}),
        ("run", "logs", {"id": "*"}),
        ("run", "cancel", {"id": "a b"}),
        ("workspace", "stop", {"id": ""}),
        ("deployment", "upload", {"archive": "../../etc/x", "offset": 0, "data": "", "last": True}),
        ("deployment", "upload", {"archive": "a" * 64, "offset": -5, "data": "", "last": True}),
    ],
)
async def test_a_bad_request_is_the_callers_mistake(helmr: AsyncClient, noun: str, verb: str, body: Any) -> None:
    with pytest.raises(UsageError):
        await helmr.wire.call(noun, verb, body, dict[str, Any])


@pytest.mark.parametrize("body", [b"not json", b"\xff", b"[]", b"5", b'{"id": '])
async def test_a_request_that_is_no_json_is_the_callers_mistake(helmr: AsyncClient, body: bytes) -> None:
    reply = await helmr.wire.nc.request(api(helmr.scope, "run", "get"), body, timeout=5)
    assert (reply.headers or {})["Nats-Service-Error"] == "usage"


async def test_nothing_is_deployed_in_an_empty_project(platform: Platform) -> None:
    client = await platform.client("empty")
    with pytest.raises(NotFound, match="nothing is deployed"):
        await client.sessions.start("quick")


def _blocking(url: str, home: Path) -> None:
    with Client(url, project="sessions", env="test", home=home) as helmr:
        started = helmr.sessions.start("quick", {"n": 3})
        assert started.run.result(timeout=20) == {"n": 3}
        assert [event.kind for event in started.run.events()] == ["queued", "leased", "started", "succeeded"]
        assert list(started.run.logs()) == []
        assert helmr.sessions.get(started.session).activity == "idle"
        with pytest.raises(HelmrError):
            helmr.runs.cancel(started.run)


async def test_the_blocking_client_does_the_same(helmr: AsyncClient, platform: Platform) -> None:
    assert helmr.scope.project == "sessions"
    await asyncio.to_thread(_blocking, platform.server.url, platform.home)
