"""The folders of the host that a container sees: Helmr's own code, the supervisor's socket, and the sources of tasks.

All of them lie below ``HELMR_HOME``, so that it is the one path that must mean the same to the worker and to the engine.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import time
from pathlib import Path

import helmr
from helmr import ids
from helmr.errors import Unavailable, UsageError

#: The longest path a unix socket can have on Linux, its closing zero byte included.
_SOCKET_PATH_LIMIT = 108
#: AT_FDCWD and RENAME_NOREPLACE of Linux, where containers are.
_HERE, _NO_REPLACE = -100, 1
#: Seconds for which a folder without a container counts as one that is just being made.
_NEW = 300.0


class MachineFolder:
    """``<home>/machines/<name>``: the socket's folder, closed to all but the supervisor, and the sources."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = home / "machines" / name
        self.run = self.path / "run"
        self.sources = self.path / "sources"
        self.files = self.path / "files"  #: of a machine that is nobody's yet: what will be the workspace's files
        self._descriptor = -1

    def create(self) -> None:
        """Make the folders; the group may enter ``run`` because a container's root is not this worker's user."""
        self.path.mkdir(parents=True, mode=0o755)
        self.run.mkdir()
        self.run.chmod(0o700 if os.getuid() == 0 else 0o770)
        self.sources.mkdir(mode=0o755)

    def socket(self, name: str = "socket") -> Path:
        """A socket of the supervisor by a path that is short enough to connect to, however deep the home folder lies."""
        path = self.run / name
        if len(os.fsencode(path)) < _SOCKET_PATH_LIMIT:
            return path
        if self._descriptor < 0:
            self._descriptor = os.open(self.run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return Path(f"/proc/self/fd/{self._descriptor}/{name}")

    async def put_source(self, name: str, tree: Path) -> None:
        """Copy the folder ``tree`` to ``sources/<name>``, all at once; see :meth:`worker.engine.Machine.put_source`.

        Raises:
            UsageError: ``name`` is not a plain name.
            Unavailable: the folder was removed, by a worker that has been given the workspace meanwhile.
        """
        if not name or name.startswith(".") or "/" in name:
            raise UsageError(f"{name!r} cannot be the name of a source")
        if (self.sources / name).exists():
            return
        try:
            await asyncio.to_thread(self._copy, name, tree)
        except OSError as error:
            if self.run.exists():
                raise
            raise Unavailable("the machine was removed by another worker of this host") from error

    def _copy(self, name: str, tree: Path) -> None:
        draft = self.sources / f".{ids.new('src')}"
        try:
            draft.mkdir()  # fails if the machine's folder has been removed, which copytree would make anew
            shutil.copytree(tree, draft, symlinks=True, copy_function=_readable_copy, dirs_exist_ok=True)
            for folder, _, _ in os.walk(draft):
                Path(folder).chmod(0o755)
            _put_in_place(draft, self.sources / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def sources_there(self) -> set[str]:
        """The names of the sources that were put in.

        Raises:
            Unavailable: the folder is gone: who took its worker for dead has removed it.
        """
        try:
            return {path.name for path in self.sources.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError as error:
            raise Unavailable(f"the folder of the machine is gone: {self.sources}") from error

    def close(self) -> None:
        """Let go of the folders, and leave them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Delete the folders; doing it twice is fine."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def workspace_files(home: Path, workspace_id: str) -> Path:
    """The folder with a workspace's files; it belongs to the user of the tasks."""
    return home / "workspaces" / workspace_id


def remove_files(home: Path, workspace_id: str) -> None:
    """Delete the files of a workspace; that there are none is fine.

    Raises:
        PermissionError: they belong to somebody else.
    """
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(workspace_files(home, workspace_id))


def sweep(home: Path, kept: set[str]) -> None:
    """Delete the folders of machines that are no more, but none so new that its container may still be on its way."""
    folder = home / "machines"
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        with contextlib.suppress(FileNotFoundError):
            if path.name not in kept and time.time() - path.stat().st_mtime > _NEW:
                shutil.rmtree(path, ignore_errors=True)


def library(home: Path) -> Path:
    """A copy of the package ``helmr`` that containers can use, made once for each state of the package.

    A copy, because a container outlives an upgrade of Helmr, and because its home folder may be all of the worker's files
    that the engine can see.
    """
    package = Path(helmr.__file__).parent
    files = sorted(path for path in package.rglob("*.py") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    folder = home / "lib" / digest.hexdigest()[:16]
    if not folder.exists():
        _install(package, files, folder)
    return folder / "helmr"


def _install(package: Path, files: list[Path], folder: Path) -> None:
    draft = folder.with_name(f".{ids.new('lib')}")
    try:
        for path in files:
            target = draft / "helmr" / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o644)
        # Of use where the image has the same Python as the worker; others compile in memory. The paths are the container's.
        compileall.compile_dir(draft / "helmr", quiet=2, stripdir=draft, prependdir="/helmr/lib")
        for parent, _, _ in os.walk(draft):
            Path(parent).chmod(0o755)
        _put_in_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def rename_unless_there(source: Path, target: Path) -> None:
    """Rename a folder, in one step that never takes the place of anything, not even of an empty folder.

    Raises:
        OSError: something has the name already, or the file system cannot do that.
    """
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), _NO_REPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _put_in_place(draft: Path, target: Path) -> None:
    try:
        draft.rename(target)
    except OSError:
        # Somebody else was first. Names stand for content, so theirs is as good.
        if not target.exists():
            raise


def _readable_copy(source: str, target: str) -> None:
    """A hard link where others may read the file anyway, else a copy that they may read."""
    mode = Path(source).stat().st_mode
    if mode & stat.S_IROTH and mode & (stat.S_IXUSR | stat.S_IXOTH) in {0, stat.S_IXUSR | stat.S_IXOTH}:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            pass  # another file system, or a limit on links: a copy does as well
        else:
            return
    shutil.copyfile(source, target)
    Path(target).chmod(0o755 if mode & stat.S_IXUSR else 0o644)
