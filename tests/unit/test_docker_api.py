"""The engine's API as Helmr sees it: agreed versions, translated errors, calls that outlive their callers' patience."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker.errors
import pytest
import requests

from helmr.errors import Conflict, EngineUnavailable, HelmrError, NotFound
from worker import docker_api
from worker.docker_api import DockerApi, EngineSilent, translate
from worker.host import host_id

pytestmark = pytest.mark.anyio


def _refusal(status: int, explanation: str = "because") -> docker.errors.APIError:
    response = requests.Response()
    response.status_code = status
    kind = docker.errors.NotFound if status == 404 else docker.errors.APIError
    return kind("x", response=response, explanation=explanation)


@pytest.mark.parametrize(
    ("raised", "kind", "part"),
    [
        (_refusal(404), NotFound, "because"),
        (_refusal(409), Conflict, "because"),
        (_refusal(500), HelmrError, "because"),
        (_refusal(500, "failed to dial /run/containerd/containerd.sock"), EngineUnavailable, "not whole"),
        (_refusal(503, "the daemon is shutting down"), EngineUnavailable, "not whole"),
        (_refusal(400, "no such shim disconnected option"), HelmrError, "refused"),
        (requests.exceptions.ReadTimeout("slow"), EngineSilent, "in time"),
        (
            requests.exceptions.ConnectionError(ConnectionRefusedError(111, "Connection refused")),
            EngineUnavailable,
            "refused",
        ),
        (docker.errors.DockerException(PermissionError(13, "Permission denied")), EngineUnavailable, "no permission"),
        (docker.errors.DockerException("who knows"), EngineUnavailable, "who knows"),
    ],
)
def test_errors_are_translated(raised: Exception, kind: type[HelmrError], part: str) -> None:
    error = translate(raised)
    assert type(error) is kind
    assert part in error.message
    assert error.hint or kind in {NotFound, Conflict, HelmrError}


def _engine_that_speaks(newest: str, oldest: str) -> Callable[..., Any]:
    class Client:
        def __init__(self, **_: Any) -> None:
            pass

        def version(self, *, api_version: bool) -> dict[str, str]:
            assert not api_version
            return {"Version": "x", "ApiVersion": newest, "MinAPIVersion": oldest}

        def close(self) -> None:
            pass

    return Client


@pytest.mark.parametrize(
    ("newest", "oldest", "agreed"),
    [("1.41", "1.12", "1.41"), ("1.43", "1.12", "1.43"), ("1.52", "1.44", "1.45"), ("1.60", "1.47", "1.47")],
)
def test_the_newest_common_version_is_spoken(
    monkeypatch: pytest.MonkeyPatch, newest: str, oldest: str, agreed: str
) -> None:
    monkeypatch.setattr(docker_api, "APIClient", _engine_that_speaks(newest, oldest))
    assert docker_api._agree_version({}) == agreed


def test_an_engine_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_api, "APIClient", _engine_that_speaks("1.39", "1.12"))
    with pytest.raises(EngineUnavailable, match="too old"):
        docker_api._agree_version({})


async def test_a_cancelled_call_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DockerApi, "_client", lambda *_: None)
    api = DockerApi()
    begun, may_end = threading.Event(), threading.Event()

    def create(_: Any) -> None:
        begun.set()
        may_end.wait(10)

    calling = asyncio.create_task(api.call(create))
    await asyncio.to_thread(begun.wait, 10)
    calling.cancel()
    await asyncio.sleep(0.02)
    assert not calling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await api.close()


async def test_a_failing_call_raises_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DockerApi, "_client", lambda *_: None)
    api = DockerApi()

    def refuse(_: Any) -> None:
        raise _refusal(409)

    with pytest.raises(Conflict):
        await api.call(refuse)
    await api.close()


class _Builder:
    """An engine that has taken a build, and says nothing."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Any]] = {"response": []}
        self.given_up = threading.Event()

    def build(self) -> Any:
        self.given_up.wait(30)
        yield {"stream": "done"}

    def close(self) -> None:
        pass


async def test_a_build_ends_when_the_engine_answers_nobody_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, api, looks = _Builder(), DockerApi(), []

    def ping(_: DockerApi) -> None:
        looks.append(1)
        if len(looks) > 2:  # until then a step takes its time, and that is all
            builder.given_up.set()
            raise requests.exceptions.ReadTimeout("slow")

    monkeypatch.setattr(docker_api, "CALL_TIMEOUT", 0.01)
    monkeypatch.setattr(DockerApi, "_connect", lambda *_, **__: builder)
    monkeypatch.setattr(DockerApi, "_ping", ping)
    with pytest.raises(EngineSilent):
        await api.stream(lambda client: client.build(), lambda _: None)
    assert len(looks) == 3
    await api.close()


def test_a_home_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HelmrError, match="cannot write below") as caught:
        host_id(tmp_path / "file" / "home")
    assert "HELMR_HOME" in str(caught.value.hint)
