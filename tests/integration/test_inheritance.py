"""What a worker that comes back after a kill -9 finds alive goes on: machines, and the runs in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.log import WORKSPACE, Log
from helmr.client import AsyncClient, RunHandle
from helmr.connection import connect
from helmr.models import Run
from helmr.reducers import workspace as rules
from helmr.subjects import Scope
from tests.integration.parts import PATIENT, patient, worker
from tests.integration.platform import history, until, write_project, written

pytestmark = pytest.mark.anyio

TASKS = """
    import os, sys, time
    from helmr import Secret, logger, metadata, step, streams, task, tokens

    numbers = streams.output("numbers")
    answers = streams.input("answers")

    def begun() -> int:
        with open("begun", "a") as file:
            file.write("x")
        return os.path.getsize("begun")

    def pause(payload: dict) -> None:
        while not os.path.exists(payload["gate"]):
            time.sleep(0.02)

    @task("where")
    def where() -> int:
        return os.getppid()

    @task("counts")
    def counts(payload: dict) -> int:
        # Says the same in every way there is, a number at a time.
        begun()
        for number in range(1, 41):
            if number == 15:
                pause(payload)
            print(f"out {number}", flush=True)
            print(f"err {number}", file=sys.stderr, flush=True)
            logger.info("line", number=number)
            metadata.set("number", number)
            assert step("double", lambda: 2 * number) == 2 * number
            numbers.append(number)
        return os.path.getsize("begun")

    @task("floods", on_worker_lost="fail")
    def floods(payload: dict) -> str:
        for number in range(40_000):
            print(f"{number:079d}")
            if number == 20_000:
                pause(payload)
        return "x" * 1_500_000

    @task("waits")
    def waits() -> list:
        begun()
        first = answers.wait(timeout="60s")
        print("heard", first, flush=True)
        second = answers.wait(timeout="60s")
        return [first, second, os.path.getsize("begun")]

    @task("ignores", cancel_grace="1s")
    def ignores() -> None:
        print("begun", flush=True)
        time.sleep(600)

    @task("whispers", secrets=[Secret("PASSWORD", env="PASSWORD")])
    def whispers(payload: dict) -> str:
        for number in range(30):
            print(number, os.environ["PASSWORD"], flush=True)
            if number == 10:
                sys.stdout.write(os.environ["PASSWORD"][:4])
                sys.stdout.flush()
                pause(payload)
                print(os.environ["PASSWORD"][4:])
        sys.stdout.write(os.environ["PASSWORD"][:-1])
        return os.environ["PASSWORD"]
"""


def _machines(home: Path) -> list[str]:
    return [path.name for path in home.glob("engine/processes/machines/*")]


class Scene:
    """One run of each kind, begun by a worker that was killed, and where they stand at its successor."""

    def __init__(self, url: str, home: Path, helmr: AsyncClient) -> None:
        self.url = url
        self.home = home
        self.helmr = helmr
        self.runs: dict[str, RunHandle] = {}
        self.first = self.second = ""
        self.machines: set[str] = set()

    async def begin(self) -> None:
        helmr = self.helmr
        await helmr.secrets.set("PASSWORD", "swordfish")
        async with worker(self.url, self.home, environment=PATIENT) as first:
            for name in ("waits woken", "waits kept"):
                self.runs[name] = (await helmr.sessions.start("waits")).run
                await until(helmr, self.runs[name], "waiting")
            gate = self.home / "gate"
            for name in ("counts", "floods", "whispers", "ignores"):
                payload = None if name == "ignores" else {"gate": str(gate)}
                self.runs[name] = (await helmr.sessions.start(name, payload)).run
            await until(helmr, self.runs["counts"], "output", count=14)
            for name, text in (("ignores", b"begun"), ("whispers", b"10 ***"), ("floods", b"%079d" % 10_000)):
                await self._read(name, text)
            self.first = first.name
            self.machines = set(_machines(self.home))
            await first.kill()
        gate.touch()
        await self.runs["ignores"].cancel(reason="nobody is there")
        await self.send("waits woken", 1)

    async def _read(self, name: str, text: bytes) -> None:
        seen = b""
        async for chunk in self.helmr.runs.logs(self.runs[name], follow=True, stream="stdout"):
            seen = seen[-len(text) :] + chunk.data
            if text in seen:
                return

    async def send(self, name: str, data: int) -> None:
        run = await self.helmr.runs.get(self.runs[name])
        await self.helmr.sessions.open(run.session_id).input("answers").send(data)

    async def end(self, name: str) -> Run:
        """A run's end, which has to be that of the execution that the killed worker began."""
        run = await self.runs[name].wait(timeout=120)
        events = await history(self.helmr, run)
        leases = [(event.data["worker"], event.dispatch_attempt) for event in events if event.kind == "leased"]
        assert leases[0] == (self.first, 1)
        assert {lease[0] for lease in leases[1:]} == {self.second}
        kinds = [event.kind for event in events]
        assert (kinds.count("started"), kinds.count("lease_lost")) == (1, 0), "its code was not executed again"
        return run


@pytest.fixture(scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    home = tmp_path_factory.mktemp("home")
    async with patient(home) as url, AsyncClient(url, project="acme", env="test", home=home) as helmr:
        await helmr.deployments.deploy(write_project(home / "project", "acme", TASKS))
        scene = Scene(url, home, helmr)
        await scene.begin()
        async with worker(url, home, environment=PATIENT) as second:
            scene.second = second.name
            yield scene
            assert await second.end() == 0


async def test_every_way_to_say_something_goes_on_where_it_was(scene: Scene) -> None:
    done = await scene.end("counts")
    assert (done.status, done.output, done.attempt, done.dispatch_attempt) == ("succeeded", 1, 1, 2)
    events = await history(scene.helmr, done)
    assert [e.data["n"] for e in events if e.kind == "output"] == [*range(1, 41)]
    assert [e.data["n"] for e in events if e.kind == "step"] == [*range(1, 41)]
    assert done.metadata == {"number": 40}
    said = await written(scene.helmr, done)
    assert said["stdout"] == b"".join(b"out %d\n" % number for number in range(1, 41))
    assert said["stderr"] == b"".join(b"err %d\n" % number for number in range(1, 41))
    lines = [json.loads(line) for line in said["log"].splitlines()]
    assert [line["fields"]["number"] for line in lines] == [*range(1, 41)]
    records = await scene.helmr.sessions.open(done.session_id).output("numbers").list()
    assert [record.data for record in records] == [*range(1, 41)]


async def test_a_flood_is_whole(scene: Scene) -> None:
    """And a task that must not begin twice may go on."""
    done = await scene.end("floods")
    assert done.status == "succeeded", done.failure
    said = await written(scene.helmr, done)
    assert said["stdout"] == b"".join(b"%079d\n" % number for number in range(40_000))


async def test_a_process_that_waits_is_kept(scene: Scene) -> None:
    for name in ("waits woken", "waits kept"):
        if name == "waits kept":
            assert (await scene.helmr.runs.get(scene.runs[name])).status == "waiting"
            await scene.send(name, 1)
        await until(scene.helmr, scene.runs[name], "waiting", count=2)
        await scene.send(name, 2)
        done = await scene.end(name)
        assert done.output == [1, 2, 1], "in the process that waited"
        assert (await written(scene.helmr, done))["stdout"] == b"heard 1\n"


async def test_a_cancel_that_nobody_heard_is_heard(scene: Scene) -> None:
    done = await scene.end("ignores")
    assert done.status == "cancelled"


async def test_secrets_stay_masked(scene: Scene) -> None:
    done = await scene.end("whispers")
    said = await written(scene.helmr, done)
    assert said["stdout"] == b"".join(b"%d ***\n" % n + (b"***\n" if n == 10 else b"") for n in range(30)) + b"swordfis"
    assert done.output == "***"


async def test_its_machines_are_those_that_were_there(scene: Scene) -> None:
    await asyncio.gather(*(scene.end(name) for name in ("counts", "floods", "whispers")))
    assert set(_machines(scene.home)) <= scene.machines


async def test_an_idle_workspace_stays_alive(tmp_path: Path) -> None:
    async with patient(tmp_path) as url, AsyncClient(url, project="acme", env="test", home=tmp_path) as helmr:
        await helmr.deployments.deploy(write_project(tmp_path / "project", "acme", TASKS))
        async with worker(url, tmp_path, environment=PATIENT) as first:
            kept, given = [await (await helmr.sessions.start("where")).run.wait(timeout=120) for _ in range(2)]
            await first.kill()
        left = _machines(tmp_path)
        await _stop_in_log(url, helmr, given.workspace_id, first.name)
        async with worker(url, tmp_path, environment=PATIENT) as second:
            live = await helmr.workspaces.get(kept.workspace_id)
            assert (live.state, live.worker) == ("live", second.name)
            (machine,) = _machines(tmp_path)
            assert machine in left, "it is one that was there; what is not live by the log was ended"
            after = await (await helmr.sessions.start("where", workspace=kept.workspace_id)).run.wait(timeout=120)
            assert (after.status, after.dispatch_attempt) == ("succeeded", 1)
            assert _machines(tmp_path) == [machine]
            assert (await helmr.workspaces.stop(kept.workspace_id)).state == "stopped"
            assert _machines(tmp_path) == []
            assert await second.end() == 0


async def _stop_in_log(url: str, helmr: AsyncClient, workspace_id: str, worker_id: str) -> None:
    nc = await connect(url, name="test")
    await Log(nc).transact(
        WORKSPACE, Scope(*helmr.scope), workspace_id, lambda s: rules.stop(s, worker=worker_id, reason="a test")
    )
    await nc.close()
