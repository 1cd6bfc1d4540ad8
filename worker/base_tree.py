"""The file tree of a base image, written straight into a tar archive, so that building one needs no root and no unpacking."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

#: The user that tasks run as, in every image.
TASK_UID = 1000
CA_BUNDLE = "etc/ssl/certs/ca-certificates.crt"

_SKIPPED = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bug|menu|doc-base|applications|pixmaps|gcc|gdb)(/|$)|.*/EXTERNALLY-MANAGED$"
    r"|usr/share/zoneinfo/(right|posix)(/|$)|(etc|var)(/|$)|.*/__pycache__(/|$)"
)
_SYSTEM_FILES = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        f"task:x:{TASK_UID}:{TASK_UID}::/home/task:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    ),
    "etc/group": f"root:x:0:\ntask:x:{TASK_UID}:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n",  # the engine mounts its own over these two
    "etc/resolv.conf": "",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/pip.conf": "[global]\nroot-user-action = ignore\ndisable-pip-version-check = true\n",
}


class Tree:
    """A tar archive under construction: ``/bin`` and its like merged into ``/usr``, all of it root's, first come first kept."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._seen: set[str] = set()
        for name in ("bin", "sbin", "lib", "lib64"):
            self.folder(f"usr/{name}")
            self.link(name, f"usr/{name}")

    def folder(self, name: str, mode: int = 0o755, uid: int = 0) -> None:
        """A folder, with those above it."""
        if name and name not in self._seen:
            self._above(name)
            self._add(_entry(name, tarfile.DIRTYPE, mode, uid))

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        if name not in self._seen:
            self._above(name)
            self._add(_entry(name, tarfile.SYMTYPE, 0o777, link=target))

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        if name not in self._seen:
            self._above(name)
            self._add(_entry(name, tarfile.REGTYPE, mode, size=len(data)), io.BytesIO(data))

    def package(self, stream: IO[bytes]) -> None:
        """The files of a Debian package, from the tar stream inside it."""
        with tarfile.open(fileobj=stream, mode="r|") as source:
            for member in source:
                name = merged(member.name)
                if name and name not in self._seen and not _SKIPPED.match(name):
                    self._above(name)
                    self._copy(source, member, name)

    def wheel(self, wheel: IO[bytes], folder: str) -> None:
        """The files of a Python wheel, installed into ``folder``."""
        with zipfile.ZipFile(wheel) as source:
            for name in source.namelist():
                if not name.endswith("/"):
                    self.file(f"{folder}/{name}", source.read(name))

    def host_path(self, path: Path) -> None:
        """A file or link of this machine at the same place, and what the link leads to."""
        name = merged(str(path))
        if path.is_symlink() and name not in self._seen:
            self.link(name, str(path.readlink()))
            self.host_path(Path(os.path.normpath(path.parent / path.readlink())))
        elif path.is_file():
            self.file(name, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)

    def system_files(self) -> None:
        """What every Linux image has: users, mount points, this machine's certificate authorities."""
        for name, text in _SYSTEM_FILES.items():
            self.file(name, text.encode())
        for name in ("dev", "proc", "sys", "run", "var", "mnt", "opt", "usr/local/bin"):
            self.folder(name)
        for name in ("tmp", "var/tmp"):
            self.folder(name, 0o1777)
        self.folder("root", 0o700)
        for name in ("home/task", "workspace"):
            self.folder(name, uid=TASK_UID)
        for name in (CA_BUNDLE, "etc/os-release"):
            if Path("/", name).is_file():
                self.file(name, Path("/", name).read_bytes())

    def _above(self, name: str) -> None:
        self.folder(name.rpartition("/")[0])

    def _copy(self, source: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        mode = member.mode & 0o1777
        if member.issym():
            self._add(_entry(name, tarfile.SYMTYPE, mode, link=member.linkname))
        elif member.islnk():
            self._add(_entry(name, tarfile.LNKTYPE, mode, link=merged(member.linkname)))
        elif member.isdir():
            self._add(_entry(name, tarfile.DIRTYPE, mode))
        elif member.isreg():
            self._add(_entry(name, tarfile.REGTYPE, mode, size=member.size), source.extractfile(member))

    def _add(self, entry: tarfile.TarInfo, data: IO[bytes] | None = None) -> None:
        self._seen.add(entry.name)
        self._archive.addfile(entry, data)


def merged(name: str) -> str:
    """A path as the archive names it: relative, and below ``usr`` where Debian's merged layout has it."""
    path = str(PurePosixPath("/", name.removeprefix("."))).lstrip("/")
    return f"usr/{path}" if path.startswith(("bin/", "sbin/", "lib/", "lib64/")) else path


def _entry(name: str, kind: bytes, mode: int, uid: int = 0, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid, entry.size, entry.linkname = kind, mode, uid, uid, size, link
    return entry
