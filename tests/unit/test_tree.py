"""What is in a folder, whatever hostile code puts there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from bus import tree
from bus.manifest import MAX_DEPTH
from helmr.errors import HelmrError
from tests.unit.trees import make_tree


def _paths(root: Path) -> list[str]:
    return [os.fsdecode(entry.path) for entry in tree.look(root).entries]


def test_folders_come_before_what_is_in_them(tmp_path: Path) -> None:
    paths = _paths(make_tree(tmp_path))
    assert len(paths) == 17
    for path in paths:
        parent = path.rpartition("/")[0]
        assert not parent or paths.index(parent) < paths.index(path)


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert tree.look(tmp_path / "none").entries == []


def test_links_are_taken_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "etc").symlink_to("/etc")
    seen = tree.look(tmp_path)
    assert [(e.path, e.kind, e.target) for e in seen.entries] == [(b"etc", "link", b"/etc"), (b"loop", "link", b".")]
    assert seen.stamps == {}


def test_what_is_neither_file_folder_nor_link_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert _paths(tmp_path) == []
    assert tree.open_file(tmp_path, b"pipe") is None
    assert tree.open_file(tmp_path, b"socket") is None


def test_a_file_behind_a_link_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "file").symlink_to("real/file")
    for path in (b"alias/file", b"file", b"real/none", b"none/file", b"real"):
        assert tree.open_file(tmp_path, path) is None
    found = tree.open_file(tmp_path, b"real/file")
    assert found is not None
    os.close(found)


def test_a_root_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        tree.look(tmp_path / "root")


def test_what_is_too_deep_or_too_much_is_refused(tmp_path: Path) -> None:
    here = tmp_path
    for _ in range(MAX_DEPTH + 1):
        here /= "d"
        here.mkdir()
    with pytest.raises(HelmrError, match="nested more than 200 deep"):
        tree.look(tmp_path)
    with pytest.raises(tree.TooMany, match="more than 5 files"):
        tree.look(tmp_path, limit=5)


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("x")
    assert tree.look(tmp_path).stamps == {b"new": tree.NEVER}
