"""Packing a task project: what belongs to it, that the hash depends on nothing else, and that unpacking is safe."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from helmr import ProjectError, TooLarge
from helmr import project as projects
from helmr.project import Rules, pack, unpack


def write(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small project."""
    folder = tmp_path / "project"
    write(folder, "helmr.toml", "tasks.py", "pkg/__init__.py", "pkg/data.bin")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o775)
    (folder / "pkg" / "link").symlink_to("data.bin")
    (folder / "pkg" / "up").symlink_to("../tasks.py")
    return folder


def test_what_is_packed_comes_out_again(root: Path, tmp_path: Path) -> None:
    archive = pack(root)
    dest = tmp_path / "deep" / "dest"
    unpack(archive.data, dest)
    assert Rules(dest).names() == Rules(root).names()
    assert (archive.files, archive.size) == (7, 4 + len("#!/bin/sh\n"))
    assert (dest / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (dest / "tasks.py").stat().st_mode & 0o777 == 0o644
    assert (dest / "pkg" / "up").read_text() == "x"
    assert os.readlink(dest / "pkg" / "link") == "data.bin"  # noqa: PTH115
    assert pack(dest).digest == archive.digest


def test_the_digest_depends_on_content_alone(root: Path) -> None:
    before = pack(root)
    os.utime(root / "tasks.py", (1, 1))
    (root / "tasks.py").chmod(0o600)
    (root / "empty").mkdir()
    write(root, "__pycache__/x.pyc", ".git/config", ".env", ".env.local", ".venv/x", "node_modules/y/z.js")
    assert pack(root) == before
    (root / "tasks.py").write_text("y")
    assert pack(root).digest != before.digest
    with tarfile.open(fileobj=io.BytesIO(before.data)) as tar:
        assert {(each.mtime, each.uid, each.gid, each.uname) for each in tar} == {(0, 0, 0, "")}


@pytest.mark.parametrize(
    ("patterns", "ignored", "kept"),
    [
        ((), [".git/", "a/.venv/", "x.pyc", ".env.prod", "a/node_modules/"], ["tasks.py", "env", "a/git"]),
        (("*.csv", "/data/"), ["a.csv", "b/c.csv", "data/"], ["a/data/", "csv"]),
        (("**/*.tmp",), ["a.tmp", "b/c.tmp"], ["tmp"]),
        (("!.env.example",), [".env"], [".env.example"]),
        (("build/", "!build/keep"), ["build/"], ["a/build"]),
        (("# comment", "", "a b"), ["a b"], ["# comment"]),
    ],
)
def test_ignore_rules(tmp_path: Path, patterns: tuple[str, ...], ignored: list[str], kept: list[str]) -> None:
    (tmp_path / ".helmrignore").write_text("\n".join(patterns))
    for rules in (Rules(tmp_path / "nowhere", patterns), Rules(tmp_path)):
        for name in ignored:
            assert rules.ignores(name.rstrip("/"), folder=name.endswith("/")), name
        for name in kept:
            assert not rules.ignores(name.rstrip("/"), folder=name.endswith("/")), name


def test_the_ignore_file_has_the_last_word(root: Path) -> None:
    (root / ".helmrignore").write_text("!tasks.py\n")
    names = Rules(root, ["*.py"]).names()
    assert "tasks.py" in names
    assert "pkg/__init__.py" not in names
    assert ".helmrignore" not in names


def test_what_is_not_a_file_is_left_out(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket"))
        assert not {"pipe", "socket"} & set(Rules(root).names())


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "pkg/../../x", "pkg/../tasks.py", ".."])
def test_links_that_leave_are_refused(root: Path, target: str) -> None:
    (root / "bad").symlink_to(target)
    with pytest.raises(ProjectError, match=r"the link bad -> .* leaves the project") as refused:
        pack(root)
    assert ".helmrignore" in (refused.value.hint or "")


def test_a_dangling_link_inside_is_kept(root: Path, tmp_path: Path) -> None:
    (root / "pkg" / "later").symlink_to("../generated.py")
    unpack(pack(root).data, tmp_path / "dest")
    assert (tmp_path / "dest" / "pkg" / "later").is_symlink()


def test_a_file_that_vanishes_meanwhile_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rules.names
    monkeypatch.setattr(Rules, "names", lambda self: [*real(self), "zz-gone.py"])
    assert pack(root).files == 7


def test_a_name_that_is_not_utf8_is_refused(root: Path) -> None:
    (root / os.fsdecode(b"\xff.py")).touch()
    with pytest.raises(ProjectError, match="not a name in UTF-8"):
        pack(root)


def test_long_and_foreign_names(root: Path, tmp_path: Path) -> None:
    name = "ordner/" + "ü" * 60 + "/" + "n" * 200 + ".py"
    write(root, name)
    unpack(pack(root).data, tmp_path / "dest")
    assert (tmp_path / "dest" / name).read_text() == "x"


def test_a_project_that_is_too_large_names_its_largest_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "SIZE_LIMIT", 5000)
    for number in range(1, 8):
        write(root, f"big-{number}.bin", text="x" * 1000 * number)
    with pytest.raises(TooLarge, match="the project is too large") as refused:
        pack(root)
    assert refused.value.details["largest"] == [f"big-{number}.bin" for number in range(7, 2, -1)]
    assert "big-7.bin" in (refused.value.hint or "")
    assert ".helmrignore" in (refused.value.hint or "")


# Archives that pack() never makes


def archive(*entries: tuple[str, bytes, str | bytes]) -> bytes:
    """A tar.gz of (name, type, content or link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if isinstance(content, str):
                entry.linkname = content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


FILE, LINK, HARD, FIFO, DEVICE = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE


@pytest.mark.parametrize(
    "data",
    [
        archive(("../evil", FILE, b"x")),
        archive(("/evil", FILE, b"x")),
        archive(("a/../../evil", FILE, b"x")),
        archive(("a//b", FILE, b"x")),
        archive(("./a", FILE, b"x")),
        archive(("link", LINK, "/etc"), ("link/evil", FILE, b"x")),
        archive(("link", LINK, ".."), ("link/evil", FILE, b"x")),
        archive(("d/x", FILE, b""), ("link", LINK, "d"), ("link/evil", FILE, b"x")),
        archive(("a", FILE, b"x"), ("a", FILE, b"y")),
        archive(("a", FILE, b"x"), ("a/b", FILE, b"y")),
        archive(("a", LINK, "b"), ("a", FILE, b"y")),
        archive(("a", FILE, b"x"), ("b", HARD, "a")),
        archive(("pipe", FIFO, "")),
        archive(("null", DEVICE, "")),
        b"not an archive",
        gzip.compress(b"not a tar"),
        archive(("a", FILE, b"x" * 5000))[:-20],
        b"",
    ],
    ids=lambda _: "archive",  # the bytes hold the time
)
def test_hostile_and_damaged_archives_are_refused(tmp_path: Path, data: bytes) -> None:
    outside = sorted(tmp_path.iterdir())
    with pytest.raises(ProjectError):
        unpack(data, tmp_path / "dest")
    assert sorted(tmp_path.iterdir()) == [*outside, tmp_path / "dest"]
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_that_grows_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "_TAR_LIMIT", 100_000)
    with pytest.raises(TooLarge, match="holds more than a project may"):
        unpack(archive(("zeros", FILE, bytes(1_000_000))), tmp_path / "dest")


def test_an_archive_of_too_many_files_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "FILE_LIMIT", 3)
    with pytest.raises(TooLarge, match="more files"):
        unpack(archive(*((f"f{number}", FILE, b"") for number in range(5))), tmp_path / "dest")


def test_special_modes_do_not_survive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("suid")
        entry.mode = 0o6777
        tar.addfile(entry)
    unpack(buffer.getvalue(), tmp_path / "dest")
    assert (tmp_path / "dest" / "suid").stat().st_mode & 0o7777 == 0o755
