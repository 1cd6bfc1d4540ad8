"""Files brought into a workspace for a start: what was made for one that does not come about is deleted again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from cli.workspace_cp import bring
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable, UsageError

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

pytestmark = pytest.mark.anyio


class _Workspaces:
    """Notes what it is asked for; the copy fails with ``error``, and deleting is refused while the copy goes on."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.asked: list[str] = []
        self.execs = self

    async def create(self, *, task: str) -> SimpleNamespace:
        self.asked.append("create")
        return SimpleNamespace(id=f"ws_of_{task}")

    async def upload(self, _workspace: str, _path: str, _dest: str) -> list[str]:
        if self.error is not None:
            raise self.error
        return []

    async def list(self, *, workspace: str) -> list[SimpleNamespace]:
        assert workspace == "ws_of_count"
        return [SimpleNamespace(id="exec_of_the_copy")]

    async def wait(self, exec_id: str, *, timeout: float) -> None:  # noqa: ASYNC109
        assert timeout > 0
        self.asked.append(f"wait {exec_id}")

    async def delete(self, _workspace: str) -> None:
        if "wait exec_of_the_copy" not in self.asked:
            raise Conflict("it is in use")
        self.asked.append("delete")


async def _bring(workspaces: _Workspaces, given: str | None, path: str, then: BaseException | None = None) -> None:
    client = cast("AsyncClient", SimpleNamespace(workspaces=workspaces))
    async with bring(client, "count", given, [(path, "")]):
        if then is not None:
            raise then


@pytest.mark.parametrize(
    "error", [HelmrError("the disk is full"), Unavailable("nobody is there"), asyncio.CancelledError()]
)
async def test_what_was_made_is_deleted_when_the_copy_fails(error: BaseException, tmp_path: Path) -> None:
    workspaces = _Workspaces(error)
    with pytest.raises(type(error)):
        await _bring(workspaces, None, str(tmp_path))
    assert workspaces.asked == ["create", "wait exec_of_the_copy", "delete"]


async def test_what_was_made_is_deleted_when_the_start_is_refused(tmp_path: Path) -> None:
    workspaces = _Workspaces(None)
    with pytest.raises(UsageError):
        await _bring(workspaces, None, str(tmp_path), UsageError("the payload does not fit"))
    assert workspaces.asked[-1] == "delete"


@pytest.mark.parametrize("error", [Unavailable("nobody is there"), asyncio.CancelledError()])
async def test_it_stays_when_the_run_may_have_been_started(error: BaseException, tmp_path: Path) -> None:
    workspaces = _Workspaces(None)
    with pytest.raises(type(error)):
        await _bring(workspaces, None, str(tmp_path), error)
    assert workspaces.asked == ["create"]


async def test_a_workspace_that_was_there_stays(tmp_path: Path) -> None:
    workspaces = _Workspaces(HelmrError("the disk is full"))
    with pytest.raises(HelmrError, match="the disk is full"):
        await _bring(workspaces, "ws_mine", str(tmp_path))
    assert workspaces.asked == []


async def test_nothing_is_made_for_what_is_not_there(tmp_path: Path) -> None:
    workspaces = _Workspaces(None)
    with pytest.raises(NotFound, match="there is no"):
        await _bring(workspaces, None, str(tmp_path / "missing"))
    assert workspaces.asked == []


async def test_what_cannot_be_deleted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspaces = _Workspaces(HelmrError("the disk is full"))

    async def refuse(_workspace: str) -> None:
        raise Conflict("it is in use")

    workspaces.delete = refuse  # type: ignore[method-assign]
    with pytest.raises(HelmrError, match="the disk is full"):
        await _bring(workspaces, None, str(tmp_path))
    assert "ws_of_count, made for this start, stays: it is in use" in capsys.readouterr().err
