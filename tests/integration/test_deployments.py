"""Deployments: versions, promotion, rollback, and that a run stays with the one it began with."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from helmr import events
from helmr.client import AsyncClient
from helmr.errors import NotFound, ProjectError, UsageError
from tests.integration.platform import Platform, running, write_project
from worker.engine import ImageGone, Machine, MachineSpec

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("version")
    def version() -> int:
        return 1
"""


@pytest.fixture
async def fresh(platform: Platform, tmp_path: Path) -> tuple[AsyncClient, Path]:
    """A client of a project of the test's own, and the folder it is in."""
    name = f"p{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    client = await platform.client(name)
    return client, write_project(tmp_path / "project", name, TASKS)


async def _version(helmr: AsyncClient) -> int:
    output: int = await (await helmr.sessions.start("version")).run.result(timeout=30)
    return output


async def test_versions_count_the_deployments_of_a_day(fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    before = events.now().strftime("%Y%m%d")
    made = [await helmr.deployments.deploy(folder) for _ in range(3)]
    day = events.now().strftime("%Y%m%d")
    assert [d.version for d in made] == [f"{day}.{n}" for n in (1, 2, 3)] or before != day
    assert len({d.content_hash for d in made}) == 1
    listed = await helmr.deployments.list()
    assert [d.version for d in listed] == [d.version for d in reversed(made)]
    assert [d.current for d in listed] == [True, False, False]


async def test_workers_hear_what_code_is_the_current_one(
    fresh: tuple[AsyncClient, Path], platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    helmr, folder = fresh
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    monkeypatch.setattr(platform.workers[0].worker.engine, "retire", lambda *said: heard.put_nowait(said))
    first = await helmr.deployments.deploy(folder)
    (folder / "more.txt").write_text("more")
    second = await helmr.deployments.deploy(folder)
    await helmr.deployments.promote(first.version)
    said = [await asyncio.wait_for(heard.get(), 60) for _ in range(3)]
    owner = f"{first.project}.{first.environment}"
    assert said == [(owner, each.content_hash) for each in (first, second, first)]


async def test_an_image_that_is_gone_when_it_is_used_is_made_again(
    fresh: tuple[AsyncClient, Path], platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    helmr, folder = fresh
    await helmr.deployments.deploy(folder)
    engine = platform.workers[0].worker.engine
    materialize, gone = engine.materialize, [ImageGone("gone")]

    async def flawed(spec: MachineSpec) -> Machine:
        if gone:
            raise gone.pop()
        return await materialize(spec)

    monkeypatch.setattr(engine, "materialize", flawed)
    assert await _version(helmr) == 1
    assert gone == []


async def test_a_deployment_says_how_long_the_history_keeps_logs_and_events(fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    with (folder / "helmr.toml").open("a") as file:
        file.write('keep_logs = "14d"\n')
    made = await helmr.deployments.deploy(folder)
    assert made.index["retention"] == {"keep_logs": 14, "keep_events": None}


async def test_deployments_at_the_same_time_get_versions_of_their_own(fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    made = await asyncio.gather(*(helmr.deployments.deploy(folder) for _ in range(4)))
    assert len({d.version for d in made}) == 4
    assert len({d.id for d in made}) == 4


async def test_the_current_one_is_used_and_can_be_rolled_back(fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    first = await helmr.deployments.deploy(folder)
    assert await _version(helmr) == 1
    write_project(folder, helmr.scope.project, TASKS.replace("return 1", "return 2"))
    second = await helmr.deployments.deploy(folder)
    assert second.content_hash != first.content_hash
    assert await _version(helmr) == 2
    assert (await helmr.deployments.promote(first.version)).current
    assert await _version(helmr) == 1
    assert (await helmr.deployments.get()).id == first.id
    assert (await helmr.deployments.get(second.version)).id == second.id
    with pytest.raises(NotFound):
        await helmr.deployments.promote("19990101.1")


async def test_a_deployment_may_wait_for_its_promotion(fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    waiting = await helmr.deployments.deploy(folder, promote=False)
    assert not waiting.current
    with pytest.raises(NotFound, match="nothing is deployed"):
        await helmr.sessions.start("version")
    await helmr.deployments.promote(waiting.id)
    assert await _version(helmr) == 1


async def test_a_run_stays_with_the_deployment_it_was_started_with(tmp_path: Path) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("acme", TASKS)
        started = await helmr.sessions.start("version")
        newer = await platform.project("acme", TASKS.replace("return 1", "return 2"))
        await platform.add_worker()
        assert await started.run.result(timeout=30) == 1
        assert await _version(newer) == 2


async def test_all_is_known_again_after_a_restart(tmp_path: Path) -> None:
    for expected in (1, 2):
        async with running(tmp_path) as platform:
            helmr = await platform.client("acme")
            if expected == 1:
                await platform.project("acme", TASKS)
            assert await _version(helmr) == 1
            assert len(await helmr.deployments.list()) == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def broken(:\n    pass\n", "tasks.py:1"),
        ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
        ("raise ValueError('at import')\n", "at import"),
        (TASKS + TASKS, "version"),
        ("x = 1\n", "task"),
    ],
    ids=["syntax", "import", "raises", "twice", "none"],
)
async def test_a_broken_project_is_not_deployed(fresh: tuple[AsyncClient, Path], source: str, says: str) -> None:
    helmr, folder = fresh
    write_project(folder, helmr.scope.project, source)
    with pytest.raises(ProjectError, match=says):
        await helmr.deployments.deploy(folder)
    assert await helmr.deployments.list() == []


async def test_environments_know_nothing_of_each_other(platform: Platform, fresh: tuple[AsyncClient, Path]) -> None:
    helmr, folder = fresh
    await helmr.deployments.deploy(folder)
    async with AsyncClient(platform.server.url, project=helmr.scope.project, env="other") as other:
        with pytest.raises(NotFound):
            await other.sessions.start("version")
        assert await other.deployments.list() == []


async def test_an_archive_must_be_what_its_name_says(helmr: AsyncClient) -> None:
    name = hashlib.sha256(b"right").hexdigest()
    body = {"archive": name, "offset": 0, "data": b"wrong", "last": True}
    with pytest.raises(Exception, match="damaged"):
        await helmr.wire.call("deployment", "upload", body, dict[str, object])
    create = {"content_hash": name, "archive": name, "archive_bytes": 5, "index": {}}
    with pytest.raises(NotFound, match="not been uploaded"):
        await helmr.wire.call("deployment", "create", create, dict[str, object])
    with pytest.raises(UsageError):
        await helmr.wire.call("deployment", "promote", {}, dict[str, object])
