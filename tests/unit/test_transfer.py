"""Trees as streams: what is kept, what is left out, and that nothing is written where it should not be."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from helmr.client.copies import name_of
from helmr.client.ignoring import Ignored
from helmr.guest import transfer
from helmr.guest.transfer import TransferError


def _packed(root: Path) -> io.BytesIO:
    out = io.BytesIO()
    assert transfer.pack(str(root), out) == []
    return io.BytesIO(out.getvalue())


def _tar(*members: tuple[str, bytes, str]) -> io.BytesIO:
    """A stream of members, each a name, a type and the target of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, target, 0o755
            tar.addfile(info)
    return io.BytesIO(out.getvalue())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "run.sh").write_bytes(b"#!/bin/sh\n" + bytes(3_000_000))
    (root / "deep" / "er" / "run.sh").chmod(0o4750)
    (root / "link").symlink_to("deep/er/run.sh")
    (root / "empty").mkdir()
    (root / os.fsdecode(b"n\xff\xfe")).write_text("any name")
    os.utime(root / "deep" / "er" / "run.sh", (1_000_000_000.5, 1_000_000_000.5))
    (root / "deep" / "er").chmod(0o555)
    return root


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "dest").mkdir()
    return tmp_path / "dest"


def test_kinds_modes_times_and_names_are_kept(tree: Path, dest: Path) -> None:
    assert transfer.unpack(_packed(tree), str(dest), "copy", "tree") == []
    for name in ("deep", "deep/er", "deep/er/run.sh", "empty", os.fsdecode(b"n\xff\xfe")):
        before, after = (tree / name).lstat(), (dest / "copy" / name).lstat()
        assert stat.S_IFMT(before.st_mode) == stat.S_IFMT(after.st_mode)
        assert before.st_mode & 0o777 == after.st_mode & 0o7777
    assert (dest / "copy" / "deep/er/run.sh").stat().st_mtime == 1_000_000_000.5
    assert (dest / "copy" / "deep/er/run.sh").read_bytes() == (tree / "deep/er/run.sh").read_bytes()
    assert (dest / "copy" / "link").readlink() == Path("deep/er/run.sh")
    (tree / "deep" / "er").chmod(0o755)
    (dest / "copy" / "deep" / "er").chmod(0o755)


@pytest.mark.parametrize(
    ("path", "name", "arrives"),
    [
        ("", "tree", "tree"),
        ("new", "tree", "new"),
        ("new/", "tree", "new/tree"),
        ("there", "tree", "there/tree"),
        ("a/b/c", "tree", "a/b/c"),
        ("", None, ""),
        ("new", None, "new"),
        ("there/", None, "there"),
    ],
)
def test_where_it_arrives(tree: Path, dest: Path, path: str, name: str | None, arrives: str) -> None:
    (dest / "there").mkdir()
    transfer.unpack(_packed(tree), str(dest), path, name)
    assert (dest / arrives / "link").is_symlink()
    for root in (tree, dest / arrives):
        (root / "deep" / "er").chmod(0o755)


def test_a_file_replaces_a_file_and_a_link_but_no_folder(tmp_path: Path, dest: Path) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "outside").write_text("outside")
    (dest / "file").write_text("old")
    (dest / "link").symlink_to(tmp_path / "outside")
    for name in ("file", "link"):
        transfer.unpack(_packed(tmp_path / "new"), str(dest), name, "new")
        assert (dest / name).read_text() == "new"
        assert not (dest / name).is_symlink()
    assert (tmp_path / "outside").read_text() == "outside"
    (dest / "folder" / "new").mkdir(parents=True)
    with pytest.raises(TransferError, match="it is a folder"):
        transfer.unpack(_packed(tmp_path / "new"), str(dest), "folder/", "new")


@pytest.mark.parametrize(
    "members",
    [
        [(".", tarfile.DIRTYPE, ""), ("../evil", tarfile.REGTYPE, "")],
        [(".", tarfile.DIRTYPE, ""), ("./a/../../evil", tarfile.REGTYPE, "")],
        [(".", tarfile.DIRTYPE, ""), ("./l", tarfile.SYMTYPE, ".."), ("./l/evil", tarfile.REGTYPE, "")],
        [(".", tarfile.SYMTYPE, ".."), ("./evil", tarfile.REGTYPE, "")],
        [(".", tarfile.DIRTYPE, ""), ("./h", tarfile.LNKTYPE, "../outside")],
        [(".", tarfile.DIRTYPE, ""), ("./d", tarfile.CHRTYPE, "")],
        [("evil", tarfile.REGTYPE, "")],
        [(".", tarfile.DIRTYPE, ""), (".", tarfile.DIRTYPE, "")],
        [],
    ],
)
@pytest.mark.parametrize("careful", [False, True])
def test_hostile_streams_write_nowhere_else(
    tmp_path: Path, dest: Path, members: list[tuple[str, bytes, str]], careful: bool
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((TransferError, OSError)):
        transfer.unpack(_tar(*members), str(dest), "copy", "copy", careful=careful)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_absolute_names_are_taken_for_relative_ones(dest: Path) -> None:
    members = [(".", tarfile.DIRTYPE, ""), ("/etc/evil", tarfile.REGTYPE, "")]
    with pytest.raises(TransferError, match="there is no etc"):
        transfer.unpack(_tar(*members), str(dest), "copy", "copy")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "out/x"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, dest: Path, path: str) -> None:
    (tmp_path / "f").write_text("x")
    (dest / "out").symlink_to(tmp_path)
    with pytest.raises(TransferError, match=r"leads out|is not in the workspace|a link, which is not followed"):
        transfer.unpack(_packed(tmp_path / "f"), str(dest), path, "f")


@pytest.mark.parametrize(
    ("at", "target", "kept"),
    [
        ("link", "file", True),
        ("a/link", "../file", True),
        ("link", "/etc/passwd", False),
        ("link", "../x", False),
        ("a/link", "../../x", False),
        ("a/link", "b/../../../x", False),
    ],
)
def test_links_that_lead_out_are_left_out_when_careful(dest: Path, at: str, target: str, kept: bool) -> None:
    folders = [(".", tarfile.DIRTYPE, ""), ("./a", tarfile.DIRTYPE, "")]
    stream = _tar(*folders, (f"./{at}", tarfile.SYMTYPE, target))
    left_out = transfer.unpack(stream, str(dest), "copy", "copy", careful=True)
    assert (dest / "copy" / at).is_symlink() == kept
    assert [kept] == [not left_out]


def test_a_stream_that_breaks_off_is_an_error(tree: Path, dest: Path) -> None:
    with pytest.raises(tarfile.TarError):
        transfer.unpack(io.BytesIO(_packed(tree).getvalue()[:100_000]), str(dest), "copy", "tree")
    (tree / "deep" / "er").chmod(0o755)


def test_what_is_of_no_kind_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree" / "pipe")
    assert transfer.pack(str(tmp_path / "tree"), io.BytesIO()) == ["pipe is neither a file nor a folder nor a link"]
    with pytest.raises(TransferError, match="there is no"):
        transfer.pack(str(tmp_path / "missing"), io.BytesIO())


def test_ignore_files_mean_what_they_mean_to_git(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".gitignore").write_text("*.log\nbuild/\n/only-here\n")
    (tmp_path / "sub" / ".gitignore").write_text("!keep.log\nlocal\n")
    (tmp_path / ".helmrignore").write_text("data\n!local\n")
    ignored = Ignored(tmp_path)
    names = (
        "a.log",
        "sub/a.log",
        "sub/keep.log",
        "keep.log",
        "only-here",
        "sub/only-here",
        "sub/local",
        "sub/deep/data",
    )
    chosen = [name for name in names if ignored.chosen(name, False)]
    assert chosen == ["sub/keep.log", "sub/only-here", "sub/local"]
    assert [ignored.chosen("build", True), ignored.chosen("build", False), ignored.chosen(".git", True)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("src", "src"), ("a/src/", "src"), (".", None), ("src/.", None), ("/", None), ("..", None), ("", None)],
)
def test_what_a_copy_is_called(path: str, name: str | None) -> None:
    assert name_of(path) == name
