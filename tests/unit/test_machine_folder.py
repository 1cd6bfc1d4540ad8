"""The folders of a machine may be gone by the time they are looked at: who took its worker for dead removes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helmr.errors import Unavailable
from worker.machine_folder import MachineFolder


def test_sources_are_listed_but_for_those_that_are_being_put_in(tmp_path: Path) -> None:
    folder = MachineFolder(tmp_path, "ws_1")
    folder.create()
    (folder.sources / "abc").mkdir()
    (folder.sources / ".draft").mkdir()
    assert folder.sources_there() == {"abc"}


def test_a_folder_that_is_gone_is_no_bug(tmp_path: Path) -> None:
    folder = MachineFolder(tmp_path, "ws_1")
    folder.create()
    shutil.rmtree(folder.path)
    with pytest.raises(Unavailable, match="is gone"):
        folder.sources_there()
