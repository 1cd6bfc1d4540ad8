"""Execs: beside runs and without, every byte both ways, ended with their client, and never executed twice."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from bus import topology
from bus.log import EXEC
from bus.services import execs as exec_service
from bus.services.execs import ExecOrder
from helmr import ids
from helmr.client import AsyncClient
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable
from helmr.events import ExecState
from helmr.models import ExecChunk
from tests.integration.platform import Platform, until
from worker import exec_output

pytestmark = pytest.mark.anyio

TASKS = """
    from pathlib import Path
    from helmr import streams, task

    go = streams.input("go")

    @task("make")
    def make() -> None:
        Path("made").write_text("by a run")

    @task("wait")
    def wait() -> str:
        Path("begun").touch()
        go.wait()
        return Path("from-exec").read_text()
"""


@pytest.fixture(scope="module")
async def workspace(helmr: AsyncClient) -> str:
    """A workspace that a run has used."""
    run = await (await helmr.sessions.start("make")).run.wait(timeout=60)
    return run.workspace_id


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_a_program_runs_to_its_end(helmr: AsyncClient, workspace: str) -> None:
    result = await helmr.workspaces.exec(workspace, ["sh", "-c", "cat made; cat >&2; exit 5"], input=b"in\0\xff")
    assert (result.stdout, result.stderr, result.exit_code) == (b"by a run", b"in\0\xff", 5)
    assert result.exec.status == "exited"
    assert (await helmr.workspaces.execs.get(result.exec.id)) == result.exec


async def test_environment_and_folder(helmr: AsyncClient, workspace: str) -> None:
    script = 'mkdir -p sub; cd sub; pwd; echo "$COLOUR"'
    first = await helmr.workspaces.exec(workspace, ["sh", "-c", script], env={"COLOUR": "blue"})
    folder, colour = first.stdout.decode().splitlines()
    assert (Path(folder).name, colour) == ("sub", "blue")
    for cwd in (folder, "sub"):
        assert (await helmr.workspaces.exec(workspace, ["pwd"], cwd=cwd)).stdout.decode().strip() == folder


async def test_what_cannot_be_started_says_why(helmr: AsyncClient, workspace: str) -> None:
    missing = await helmr.workspaces.exec(workspace, ["no-such-program"])
    assert missing.exit_code == 127
    assert "no-such-program" in (missing.exec.reason or "")
    with pytest.raises(NotFound):
        await helmr.workspaces.exec(ids.new("ws"), ["true"])


async def test_megabytes_both_ways_are_whole(helmr: AsyncClient, workspace: str) -> None:
    data = os.urandom(12_000_000)
    async with await helmr.workspaces.execs.open(workspace, ["cat"]) as process:

        async def feed() -> None:
            await process.write(data)
            await process.end_input()

        feeding = asyncio.create_task(feed())
        back = b"".join([chunk.data async for chunk in process])
        await feeding
        assert (await process.wait()).exit_code == 0
    assert _sum(back) == _sum(data)


async def test_a_slow_reader_holds_the_process_up_and_not_the_worker(helmr: AsyncClient, workspace: str) -> None:
    async with await helmr.workspaces.execs.open(
        workspace, ["sh", "-c", "yes | head -c 30000000; echo -n done"]
    ) as process:
        size, last = 0, b""
        async for chunk in process:
            if size == 0:  # others are served while this one waits
                assert (await helmr.workspaces.exec(workspace, ["echo", "hi"])).stdout == b"hi\n"
                assert not process.record.ended
            size, last = size + len(chunk.data), (last + chunk.data)[-4:]
    assert (size, last) == (30_000_004, b"done")


async def test_only_the_latest_output_is_kept(
    helmr: AsyncClient, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exec_output, "KEPT", 1_000_000)
    started = await helmr.workspaces.execs.start(workspace, ["sh", "-c", "yes | head -c 5000000"])
    ended = await helmr.workspaces.execs.wait(started, timeout=60)
    assert ended.stdout == 5_000_000
    with pytest.raises(NotFound, match="before byte") as refused:
        [chunk async for chunk in helmr.workspaces.execs.output(started, stream="stdout", offset=0)]
    earliest = refused.value.details["earliest"]
    assert 3_800_000 < earliest < 5_000_000
    kept = [chunk async for chunk in helmr.workspaces.execs.output(started, stream="stdout", offset=earliest)]
    assert sum(len(chunk.data) for chunk in kept) == 5_000_000 - earliest


async def test_the_same_key_starts_it_once(helmr: AsyncClient, workspace: str) -> None:
    script = ["sh", "-c", "echo x >> count; cat count"]
    first = await helmr.workspaces.execs.start(workspace, script, idempotency_key="k")
    second = await helmr.workspaces.execs.start(workspace, script, idempotency_key="k")
    assert first.id == second.id
    await helmr.workspaces.execs.wait(first, timeout=60)
    assert [chunk.data async for chunk in helmr.workspaces.execs.output(first)] == [b"x\n"]
    with pytest.raises(Conflict, match="another one"):
        await helmr.workspaces.execs.start(workspace, ["true"], idempotency_key="k")


async def test_asked_for_twice_at_the_same_time_it_is_started_once(helmr: AsyncClient, workspace: str) -> None:
    script = ["sh", "-c", "echo x >> twice; cat twice"]
    asked = (helmr.workspaces.execs.start(workspace, script, idempotency_key="twice") for _ in range(4))
    (found,) = {each.id for each in await asyncio.gather(*asked)}
    await helmr.workspaces.execs.wait(found, timeout=60)
    assert b"".join([chunk.data async for chunk in helmr.workspaces.execs.output(found)]) == b"x\n"


async def test_an_order_that_was_answered_too_late_is_not_followed(
    platform: Platform, helmr: AsyncClient, workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    execs = platform.workers[0].worker.execs
    orders: asyncio.Queue[ExecOrder] = asyncio.Queue()

    async def stall(order: ExecOrder) -> ExecState:
        await orders.put(order)
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    monkeypatch.setattr(exec_service, "_ACCEPT_TIMEOUT", 0.2)
    monkeypatch.setattr(execs, "accept", stall)
    with pytest.raises(Unavailable, match="does not answer"):
        await helmr.workspaces.exec(workspace, ["touch", "late"])
    monkeypatch.undo()
    order = await orders.get()
    with pytest.raises(Conflict):
        await execs.accept(order)
    assert (await helmr.workspaces.execs.get(order.id)).status == "failed"
    assert (await helmr.workspaces.exec(workspace, ["ls", "late"])).exit_code != 0


async def test_leaving_ends_it_and_a_detached_one_goes_on(helmr: AsyncClient, workspace: str) -> None:
    script = ["sh", "-c", "echo begun; sleep 600 & wait"]
    async with await helmr.workspaces.execs.open(workspace, script) as process:
        assert (await anext(aiter(process))).data == b"begun\n"
    ended = await helmr.workspaces.execs.wait(process.id, timeout=60)
    assert (ended.status, ended.reason, ended.exit_code) == ("exited", "its client went away", 143)
    async with await helmr.workspaces.execs.open(workspace, script) as process:
        await anext(aiter(process))
        process.detached = True
    assert (await helmr.workspaces.execs.get(process.id)).status == "running"
    async with await helmr.workspaces.execs.attach(process.id) as again:
        assert (await anext(aiter(again))).data == b"begun\n"
        await again.signal(15)
        assert (await again.wait()).exit_code == 143


async def test_a_client_that_vanishes_takes_it_along(platform: Platform, helmr: AsyncClient, workspace: str) -> None:
    other = AsyncClient(platform.server.url, project=helmr.scope.project, env="test", home=platform.home)
    await other.__aenter__()
    process = await other.workspaces.execs.open(workspace, ["sh", "-c", "echo begun; sleep 600"])
    await process.__aenter__()
    await anext(aiter(process))
    await other.wire.nc.close()  # as if it had been killed: no good-bye
    ended = await helmr.workspaces.execs.wait(process.id, timeout=60)
    assert ended.reason == "its client went away"
    await process._hang_up()


async def test_kill_ends_the_whole_tree(helmr: AsyncClient, workspace: str) -> None:
    script = "trap '' TERM; (trap '' TERM; setsid sleep 600) & echo $!; wait"
    started = await helmr.workspaces.execs.start(workspace, ["sh", "-c", script])
    await _written(helmr, started.id, b"\n")
    await helmr.workspaces.execs.kill(started, grace=0)
    ended = await helmr.workspaces.execs.wait(started, timeout=60)
    assert (ended.exit_code, ended.reason) == (137, "it was killed on request")
    assert (await helmr.workspaces.execs.kill(started)).ended
    with pytest.raises(Conflict, match="has ended"):
        await helmr.workspaces.execs.kill(started, signal=1)


async def _written(helmr: AsyncClient, exec_id: str, words: bytes) -> list[ExecChunk]:
    found = []
    async for chunk in helmr.workspaces.execs.output(exec_id, follow=True):
        found.append(chunk)
        if words in b"".join(each.data for each in found):
            break
    return found


async def test_it_works_beside_a_run_that_waits(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("wait")
    await until(helmr, started.run, "waiting")
    workspace = started.run.record.workspace_id
    result = await helmr.workspaces.exec(workspace, ["sh", "-c", "ls begun; echo -n hello > from-exec"])
    assert result.stdout == b"begun\n"
    await helmr.sessions.open(started.session).input("go").send(True)
    assert await started.run.result(timeout=60) == "hello"


async def test_what_it_changes_is_a_version_and_it_brings_a_stopped_workspace_to_life(
    helmr: AsyncClient, workspace: str
) -> None:
    await helmr.workspaces.stop(workspace)
    before = len(await helmr.workspaces.versions(workspace))
    made = await helmr.workspaces.exec(workspace, ["sh", "-c", "echo new > fresh"])
    await helmr.workspaces.exec(workspace, ["cat", "fresh"])
    versions = await helmr.workspaces.versions(workspace)
    assert (len(versions), versions[0].reason) == (before + 1, f"the end of {made.exec.id}")
    assert b"".join([part async for part in helmr.workspaces.read(workspace, "fresh")]) == b"new\n"


async def test_a_workspace_in_use_is_not_stopped(helmr: AsyncClient, workspace: str) -> None:
    async with await helmr.workspaces.execs.open(workspace, ["cat"]) as process:
        await process.write(b"x")
        await anext(aiter(process))
        with pytest.raises(Conflict, match="in use"):
            await helmr.workspaces.stop(workspace)
        await process.end_input()
        assert (await process.wait()).exit_code == 0


async def test_a_terminal(helmr: AsyncClient, workspace: str) -> None:
    script = ["sh", "-c", "stty size; read x; stty size; exit 4"]
    async with await helmr.workspaces.execs.open(workspace, script, terminal=(30, 100)) as process:
        said, first = aiter(process), b""
        while not first.endswith(b"\r\n"):  # a terminal hands a line out in pieces
            first += (await anext(said)).data
        assert first == b"30 100\r\n"
        await process.resize(40, 90)
        await process.write(b"ok\n")
        assert b"".join([chunk.data async for chunk in said]) == b"ok\r\n40 90\r\n"
        assert (await process.wait()).exit_code == 4
    assert process.id.startswith("pty_")


async def test_execs_are_listed(helmr: AsyncClient, workspace: str) -> None:
    result = await helmr.workspaces.exec(workspace, ["echo", "listed"])
    found = await helmr.workspaces.execs.list(workspace=workspace, limit=3)
    assert found[0] == result.exec
    assert found[0].argv == ("echo", "listed")


async def test_a_worker_that_is_stopping_begins_none(platform: Platform, helmr: AsyncClient, workspace: str) -> None:
    worker = platform.workers[0].worker
    worker.execs.refuse()
    try:
        with pytest.raises(HelmrError, match="stopping"):
            await helmr.workspaces.exec(workspace, ["true"])
    finally:
        worker.execs._closed = False
    (newest, *_) = await helmr.workspaces.execs.list(workspace=workspace, limit=1)
    assert newest.status == "failed"
    info = await platform.nc.jetstream().stream_info(topology.EXECS)
    assert info.config.max_age == topology.EXEC_AGE
    assert (await platform.control.log.last(EXEC, helmr.scope, newest.id)).state.finished_at is not None
