"""Folders to make versions of, and what two of them have in common."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def make_tree(root: Path) -> Path:
    """A bit of everything that a version keeps."""
    (root / "src" / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o750)
    (root / "a.txt").write_text("hello\n")
    (root / "src" / "tool.sh").write_text("#!/bin/sh\n")
    (root / "src" / "tool.sh").chmod(0o755)
    (root / "src" / "deep" / "er" / "private").write_bytes(os.urandom(5000))
    (root / "src" / "deep" / "er" / "private").chmod(0o600)
    (root / "nothing").touch()
    (root / "copy of a").write_text("hello\n")
    (root / "link").symlink_to("a.txt")
    (root / "outside").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("../../nowhere")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe latin \xe4")).write_text("a name in no encoding")
    (root / "neuer Ordner, ümlaut").mkdir()
    with (root / "sparse").open("wb") as file:
        file.seek(9 * 1024**2)
        file.write(b"end")
    (root / "readonly").mkdir()
    (root / "readonly" / "x").write_text("x")
    (root / "readonly" / "x").chmod(0o400)
    (root / "readonly").chmod(0o500)
    os.utime(root / "a.txt", ns=(1, 1_600_000_000_123_456_789))
    return root


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree that a version keeps: kinds, modes, content, times of files, targets of links."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name, mode = str(path.relative_to(root)), stat.S_IMODE(status.st_mode)
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[name] = ("folder", mode)
        elif path.is_file():
            found[name] = ("file", mode, status.st_mtime_ns, path.read_bytes())
    return found
