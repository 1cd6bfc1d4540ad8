"""Versions in the life of workspaces: made at the end of runs, and what a workspace goes on from when its host is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bus.artifacts import digest_of
from bus.garbage import Garbage
from bus.log import WORKSPACE
from helmr.client import AsyncClient
from helmr.errors import Conflict, NotFound, UsageError
from helmr.events import WorkspaceEvent
from helmr.models import Run
from helmr.subjects import Scope
from tests.integration.platform import Platform, running, until

pytestmark = pytest.mark.anyio

TASKS = """
    import os, time
    from pathlib import Path
    from helmr import task

    @task("write")
    def write(payload: dict) -> list:
        for name, text in payload.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
        return sorted(str(path) for path in Path().rglob("*") if path.is_file())

    @task("break")
    def break_(payload: dict):
        Path("broken").write_text("half")
        raise ValueError("no")

    @task("large")
    def large(payload: dict):
        write(payload)
        Path("large").write_text("x" * 5_000_000)

    @task("hold")
    def hold():
        time.sleep(60)

    @task("nothing")
    def nothing():
        pass

    @task("endless")
    def endless():
        with open("endless", "wb") as file:
            os.truncate(file.fileno(), 2**40)
"""


async def _events(platform: Platform, helmr: AsyncClient, workspace: str) -> list[WorkspaceEvent]:
    return await platform.control.log.events(WORKSPACE, Scope(*helmr.scope), workspace)


async def _kinds(platform: Platform, helmr: AsyncClient, workspace: str) -> list[str]:
    return [event.kind for event in await _events(platform, helmr, workspace)]


async def _do(helmr: AsyncClient, task: str, payload: Any = None, workspace: str | None = None) -> Run:
    return await (await helmr.sessions.start(task, payload, workspace=workspace)).run.wait(timeout=60)


async def test_a_run_that_wrote_something_leaves_a_version(platform: Platform, helmr: AsyncClient) -> None:
    run = await _do(helmr, "write", {"a": "1", "d/b": "2"})
    events = await _events(platform, helmr, run.workspace_id)
    assert [event.kind for event in events] == ["created", "materialized", "captured"]
    data = events[-1].data
    assert (data["run_id"], data["files"], data["bytes"], data["parent"]) == (run.id, 2, 2, None)
    workspace = await helmr.workspaces.get(run.workspace_id)
    assert workspace.version == data["version"]
    assert events[-1].at < (run.finished_at or events[-1].at)
    again = await _do(helmr, "write", {"a": "2"}, run.workspace_id)
    last = (await _events(platform, helmr, again.workspace_id))[-1]
    assert (last.kind, last.data["parent"], last.state.versions) == ("captured", data["version"], 2)


async def test_a_run_that_wrote_nothing_leaves_none(platform: Platform, helmr: AsyncClient) -> None:
    run = await _do(helmr, "nothing")
    await _do(helmr, "nothing", workspace=run.workspace_id)
    assert await _kinds(platform, helmr, run.workspace_id) == ["created", "materialized"]
    await helmr.workspaces.stop(run.workspace_id)
    assert await _kinds(platform, helmr, run.workspace_id) == ["created", "materialized", "stopped"]


async def test_a_run_that_failed_leaves_its_files_all_the_same(platform: Platform, helmr: AsyncClient) -> None:
    run = await _do(helmr, "break", {})
    assert run.status == "failed"
    assert "captured" in await _kinds(platform, helmr, run.workspace_id)


async def test_what_cannot_be_stored_is_said_and_keeps_the_workspace_where_it_is(
    platform: Platform, helmr: AsyncClient
) -> None:
    run = await _do(helmr, "endless")
    assert run.status == "succeeded"
    events = await _events(platform, helmr, run.workspace_id)
    assert (events[-1].kind, events[-1].state.unsaved) == ("uncaptured", True)
    logged = b"".join([chunk.data async for chunk in helmr.runs.logs(run)])
    assert b"there is no version of the workspace's files: a file of 1099511627776 bytes" in logged


async def test_a_workspace_goes_on_elsewhere_when_its_host_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        first = await platform.add_worker(home=tmp_path / "one")
        helmr = await platform.project("moving", TASKS)
        run = await _do(helmr, "write", {"a": "1", "d/b": "2"})
        await platform.stop_worker(first)
        # Never captured: what a killed worker's run was about to write.
        (stale,) = (tmp_path / "one" / "engine" / "workspaces").iterdir()
        (stale / "stale").write_text("x")
        second = await platform.add_worker(home=tmp_path / "two")
        moved = await _do(helmr, "write", {"c": "3"}, run.workspace_id)
        assert moved.output == ["a", "c", "d/b"]
        kinds = await _kinds(platform, helmr, run.workspace_id)
        assert kinds == ["created", "materialized", "captured", "stopped", "unbound", "materialized", "captured"]
        await platform.stop_worker(second)
        await platform.add_worker(home=tmp_path / "one")
        back = await _do(helmr, "write", {}, run.workspace_id)
        assert back.output == ["a", "c", "d/b"]
        assert not (tmp_path / "one" / "engine" / "restoring" / run.workspace_id).exists()


async def test_a_workspace_with_files_that_are_nowhere_else_waits_for_its_host(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        first = await platform.add_worker(home=tmp_path / "one")
        helmr = await platform.project("unsaved", TASKS)
        run = await _do(helmr, "endless")
        await platform.stop_worker(first)
        await platform.add_worker(home=tmp_path / "two")
        waiting = (await helmr.sessions.start("write", {"a": "1"}, workspace=run.workspace_id)).run
        moves = await _do(helmr, "write", {"a": "1"})  # the time that a rescue takes, and more
        assert moves.status == "succeeded"
        await platform.add_worker(home=tmp_path / "one")
        assert (await waiting.wait(timeout=60)).output == ["a", "endless"]
        assert "unbound" not in await _kinds(platform, helmr, run.workspace_id)


async def _content(helmr: AsyncClient, workspace: str, path: str, version: str | None = None) -> bytes:
    return b"".join([data async for data in helmr.workspaces.read(workspace, path, version=version)])


async def test_versions_are_listed_and_looked_into_without_a_container(platform: Platform, helmr: AsyncClient) -> None:
    run = await _do(helmr, "write", {"a": "first", "d/e/b": "2"})
    await _do(helmr, "large", {"a": "second"}, run.workspace_id)
    workspace = (await helmr.workspaces.stop(run.workspace_id)).id
    second, first = await helmr.workspaces.versions(workspace)
    assert [(each.number, each.files, each.run_id == run.id) for each in (first, second)] == [
        (1, 2, True),
        (2, 3, False),
    ]
    assert (second.parent, first.parent) == (first.id, None)
    assert [each.path for each in await helmr.workspaces.files(workspace)] == ["a", "d", "large"]
    deep = await helmr.workspaces.files(workspace, "d", version="1", recursive=True)
    assert [(each.path, each.kind) for each in deep] == [("d/e", "folder"), ("d/e/b", "file")]
    assert await _content(helmr, workspace, "a") == b"second"
    assert await _content(helmr, workspace, "a", first.id) == b"first"
    assert await _content(helmr, workspace, "large") == b"x" * 5_000_000
    stat = await helmr.workspaces.stat(workspace, "d/e/b")
    assert (stat.kind, stat.size, stat.target) == ("file", 1, None)
    for path in ("/workspace/d/e/b", "d//e/./b", "/d/e/b"):
        assert (await helmr.workspaces.stat(workspace, path)).path == "d/e/b"
    assert await helmr.workspaces.files(workspace, "/workspace") == await helmr.workspaces.files(workspace)
    assert "materialized" not in (await _kinds(platform, helmr, workspace))[-2:]
    for path, version, error in (
        ("no", None, NotFound),
        ("a", "9", NotFound),
        ("a", "ver_", Conflict),
        ("d", None, UsageError),
    ):
        with pytest.raises(error):
            await _content(helmr, workspace, path, version)
    nothing = await _do(helmr, "nothing")
    with pytest.raises(NotFound, match="has no version yet"):
        await helmr.workspaces.files(nothing.workspace_id)


async def test_a_workspace_goes_back_to_a_version_and_loses_none(helmr: AsyncClient) -> None:
    run = await _do(helmr, "write", {"a": "first"})
    await _do(helmr, "write", {"a": "second", "b": "more"}, run.workspace_id)
    restored = await helmr.workspaces.restore(run.workspace_id, "1")
    assert (restored.state, restored.host) == ("stopped", None)
    assert await _content(helmr, run.workspace_id, "a") == b"first"
    after = await _do(helmr, "write", {"c": "3"}, run.workspace_id)
    assert after.output == ["a", "c"]
    versions = await helmr.workspaces.versions(run.workspace_id)
    assert [each.number for each in versions] == [3, 2, 1]
    assert versions[0].parent == versions[2].id
    await helmr.workspaces.restore(run.workspace_id, "2")
    assert (await _do(helmr, "write", {}, run.workspace_id)).output == ["a", "b"]
    with pytest.raises(NotFound, match="has no version 7"):
        await helmr.workspaces.restore(run.workspace_id, "7")


async def test_a_fork_goes_its_own_way(helmr: AsyncClient) -> None:
    run = await _do(helmr, "write", {"a": "first"})
    await _do(helmr, "write", {"a": "second"}, run.workspace_id)
    await helmr.workspaces.update(run.workspace_id, tag=["mine"], metadata={"owner": "ada"})
    early, late = (
        await helmr.workspaces.fork(run.workspace_id, version="1"),
        await helmr.workspaces.fork(run.workspace_id, tags=["experiment"]),
    )
    assert (early.tags, early.metadata) == (("mine",), {"owner": "ada"})
    assert (late.tags, late.metadata) == (("experiment",), {"owner": "ada"})
    assert len({run.workspace_id, early.id, late.id}) == 3
    assert await _content(helmr, early.id, "a") == b"first"
    assert (await _do(helmr, "write", {"b": "of the fork"}, late.id)).output == ["a", "b"]
    assert (await _do(helmr, "write", {}, run.workspace_id)).output == ["a"]
    assert [each.number for each in await helmr.workspaces.versions(late.id)] == [2, 1]
    assert await _content(helmr, late.id, "a", "1") == b"second"
    with pytest.raises(NotFound, match="has no version yet"):
        await helmr.workspaces.fork((await _do(helmr, "nothing")).workspace_id)


async def test_what_deleted_workspaces_leave_is_garbage_and_nothing_else(tmp_path: Path) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("garbage", TASKS)
        kept = await _do(helmr, "write", {"a": "kept"})
        gone = await _do(helmr, "write", {"a": "gone"})
        forked = await _do(helmr, "write", {"a": "forked"})
        fork = await helmr.workspaces.fork(forked.workspace_id)
        store = platform.control.versions.versions.store
        stray = b"a pack of a capture that was killed"
        await store.put_bytes(digest_of(stray), stray)
        files = tmp_path / "engine" / "workspaces"
        for each in (gone, forked):
            assert (await helmr.workspaces.delete(each.workspace_id)).state == "deleted"
            assert not (files / each.workspace_id).exists()
            assert not (tmp_path / "engine" / "versions" / each.workspace_id).exists()
        assert (files / kept.workspace_id).exists()
        young = await helmr.workspaces.collect(remove=True)
        assert (young.blobs, young.kept) == (0, 7)
        garbage = Garbage(platform.nc, platform.control.versions.versions, min_age=0)
        found = await garbage.find()
        assert (len(found.garbage), found.kept) == (3, 4)
        assert digest_of(stray) in {each.digest for each in found.garbage}
        assert await store.has(digest_of(stray))
        await garbage.remove(found)
        assert (await garbage.find()).garbage == ()
        assert await _content(helmr, kept.workspace_id, "a") == b"kept"
        assert await _content(helmr, fork.id, "a") == b"forked"
        with pytest.raises(Conflict, match="is deleted"):
            await helmr.workspaces.fork(gone.workspace_id)
        with pytest.raises(Conflict, match="is deleted"):
            await helmr.sessions.start("write", {}, workspace=gone.workspace_id)


async def test_a_workspace_in_use_is_not_deleted(platform: Platform, helmr: AsyncClient) -> None:
    run = (await helmr.sessions.start("hold")).run
    await until(helmr, run, "started")
    with pytest.raises(Conflict, match="is in use"):
        await helmr.workspaces.delete(run.record.workspace_id)
    await run.cancel(force=True)
    await run.wait(timeout=30)
    assert "deleted" not in await _kinds(platform, helmr, run.record.workspace_id)
