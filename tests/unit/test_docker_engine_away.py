"""What becomes of containers while the engine does not answer: nothing is left behind, and no image is blamed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from helmr.errors import EngineUnavailable, HelmrError, ImageError, Unavailable
from worker.channel import Channel
from worker.container_spec import KIND, WORKER
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import MachineSpec
from worker.machine_folder import MachineFolder

pytestmark = pytest.mark.anyio


class Api:
    """An engine with these containers; away while ``away``."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, Any]] = {}
        self.away = False
        self.said = b""

    async def call(self, function: Callable[[Any], Any], **_: float) -> Any:
        if self.away:
            raise EngineUnavailable("no Docker engine answers")
        return function(self)

    async def close(self) -> None:
        pass

    def add(self, name: str, worker: str) -> str:
        self.there[name] = {"Id": name, "Names": [f"/{name}"], "Labels": {WORKER: worker}}
        return name

    def containers(self, *, filters: dict[str, list[str]], **_: Any) -> list[dict[str, Any]]:
        return list(self.there.values()) if f"{KIND}=machine" in filters["label"] else []

    def remove_container(self, ref: str, **_: Any) -> None:
        del self.there[ref]

    def logs(self, *_: Any, **__: Any) -> bytes:
        return self.said


class Lost:
    """A connection that has ended."""

    lost = "the supervisor ended"

    def stop(self, grace: float) -> None:
        pass

    def close(self, reason: str) -> None:
        pass

    async def wait_lost(self) -> str:
        return self.lost


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def engine(tmp_path: Path, api: Api) -> DockerEngine:
    return DockerEngine(tmp_path, api=cast("Any", api))


def _spec(worker: str) -> MachineSpec:
    return MachineSpec(workspace_id="ws_1", worker_id=worker, image="image", network="none")


async def _machine(engine: DockerEngine, api: Api, monkeypatch: pytest.MonkeyPatch) -> DockerMachine:
    async def start(spec: MachineSpec, name: str, folder: MachineFolder) -> str:
        folder.create()
        return api.add(name, spec.worker_id)

    async def greet(*_: Any) -> Channel:
        return cast("Channel", Lost())

    monkeypatch.setattr(engine._boot, "start", start)
    monkeypatch.setattr(engine._boot, "greet", greet)
    return await engine.materialize(_spec("wrk_1"))


async def test_a_container_that_could_not_be_removed_goes_later(
    engine: DockerEngine, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await _machine(engine, api, monkeypatch)
    assert await engine.collect({"wrk_1"}) == []
    api.away = True
    await machine.stop()
    assert api.there
    api.away = False
    assert await engine.collect({"wrk_1"}) == [machine.ref[:12]]
    assert not api.there


async def test_a_container_that_the_engine_made_after_we_had_given_up_goes_later(
    engine: DockerEngine, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    async def start(_: MachineSpec, name: str, folder: MachineFolder) -> str:
        folder.create()
        names.append(name)
        raise EngineUnavailable("the Docker engine did not answer in time")

    monkeypatch.setattr(engine._boot, "start", start)
    monkeypatch.setattr(api, "remove_container", lambda *_, **__: None)
    with pytest.raises(EngineUnavailable):
        await engine.materialize(_spec("wrk_1"))
    monkeypatch.undo()
    api.add(names[0], "wrk_1")
    assert await engine.collect({"wrk_1"}) == [names[0][:12]]


async def test_containers_of_living_neighbours_are_spared(engine: DockerEngine, api: Api) -> None:
    api.add("helmr-ws_1-alive", "wrk_2")
    api.add("helmr-ws_2-dead", "wrk_3")
    assert await engine.collect({"wrk_1", "wrk_2"}) == ["helmr-ws_2-d"]


async def test_an_engine_that_goes_away_among_removals_is_one_error(
    engine: DockerEngine, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise EngineUnavailable("no Docker engine answers")

    api.add("helmr-ws_1-one", "wrk_2")
    api.add("helmr-ws_2-two", "wrk_2")
    monkeypatch.setattr(api, "remove_container", leave)
    with pytest.raises(EngineUnavailable):
        await engine.collect(set())


@pytest.mark.parametrize(
    ("code", "out_of_memory", "kind"),
    [(137, False, Unavailable), (143, False, Unavailable), (137, True, ImageError), (1, False, ImageError)],
)
async def test_an_image_is_not_blamed_for_a_container_that_was_killed(
    engine: DockerEngine, code: int, out_of_memory: bool, kind: type[HelmrError]
) -> None:
    error = await engine._boot._stillborn("image", "ref", {"ExitCode": code, "OOMKilled": out_of_memory})
    assert type(error) is kind
    assert f"exit code {code}" in error.message


async def test_a_silent_supervisor_is_ended_with_its_container(
    engine: DockerEngine, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await _machine(engine, api, monkeypatch)
    await machine._kill()
    assert not api.there
    await asyncio.wait({machine._minding}, timeout=30)
