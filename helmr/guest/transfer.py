"""Trees of files as streams, in and out of a workspace: packed here, unpacked there, with nothing followed and nothing trusted.

The stream is a tar. Its first member is ``.``: what is copied, a folder, a file or a link; the names of the others are
relative to it. The same code runs at both ends, in the container and at the client. Neither trusts the other: names that climb
are refused, folders are entered one by one by descriptor, and never through a link. Kept are kinds, permissions, times and the
targets of links; owners, set-uid bits, devices, pipes and sockets are not.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tarfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

    #: Of a path relative to the root, and whether it is a folder: whether it is to be copied.
    Chosen = Callable[[str, bool], bool]

_BUFFER = 1024 * 1024
_RECORD = 128 * 1024
_PERMISSIONS = 0o777


class TransferError(Exception):
    """Something cannot be copied; says what and why."""


def main(workspace: str, task: dict[str, Any]) -> int:
    """In the container: send or receive, over standard output or input; what goes wrong is said on standard error."""
    try:
        if task["op"] == "send":
            with open(1, "wb", buffering=0, closefd=False) as out:
                left_out = pack(_inside(workspace, task["path"]), out)
        else:
            with open(0, "rb", buffering=_BUFFER, closefd=False) as source:
                left_out = unpack(source, workspace, task["path"], task["name"])
                while source.read(_BUFFER):  # what pads a tar: whoever sends it wants to get rid of it
                    pass
    except (TransferError, OSError, tarfile.TarError) as error:
        sys.stderr.write(f"{said(error)}\n")
        return 1
    sys.stderr.writelines(f"left out: {line}\n" for line in left_out)
    sys.stderr.flush()
    return 0


def said(error: BaseException) -> str:
    """An error in words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def parts_of(path: str) -> list[str]:
    """The names in a path that may only lead down.

    Raises:
        TransferError: it does not.
    """
    names = [name for name in path.split("/") if name not in {"", "."}]
    if ".." in names or "\0" in path:
        raise TransferError(f"the path {path!r} leads out of what is copied")
    return names


def _inside(workspace: str, path: str) -> str:
    """The path of something in the workspace.

    Raises:
        TransferError: it is outside, or leads through a link.
    """
    names = parts_of(_relative(workspace, path))
    with _Folder(workspace) as folder:
        for name in names[:-1]:
            folder.enter(name)
    return os.path.join(workspace, *names)


def _relative(workspace: str, path: str) -> str:
    if not path.startswith("/"):
        return path
    if path == workspace or path.startswith(f"{workspace}/"):
        return path[len(workspace) :]
    raise TransferError(f"{path} is not in the workspace, which is {workspace}")


# Packing


def pack(root: str, out: BinaryIO, chosen: Chosen = lambda _path, _folder: True) -> list[str]:
    """Write the tree at ``root`` (a folder, a file or a link); returns what was left out, and why.

    Raises:
        TransferError: there is nothing.
        OSError: it cannot be read, or not be written.
    """
    left_out: list[str] = []
    with tarfile.open(
        fileobj=out,
        mode="w|",
        bufsize=_RECORD,
        format=tarfile.PAX_FORMAT,
        errors="surrogateescape",
    ) as tar:
        tar.copybufsize = _BUFFER  # type: ignore[attr-defined]
        try:
            status = os.lstat(root)
        except FileNotFoundError:
            raise TransferError(f"there is no {root}") from None
        if not _add(tar, root, ".", status):
            raise TransferError(f"{root} is neither a file nor a folder nor a link")
        if stat.S_ISDIR(status.st_mode):
            for path, name in _below(root, "", chosen):
                _add_found(tar, path, name, left_out)
    return left_out


def _below(folder: str, prefix: str, chosen: Chosen) -> Iterator[tuple[str, str]]:
    """Everything in a folder that is chosen, folders before what is in them, in a stable order."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if chosen(name, is_folder):
            yield entry.path, name
            if is_folder:
                yield from _below(entry.path, f"{name}/", chosen)


def _add_found(tar: tarfile.TarFile, path: str, name: str, left_out: list[str]) -> None:
    try:
        if not _add(tar, path, f"./{name}", os.lstat(path)):
            left_out.append(f"{name} is neither a file nor a folder nor a link")
    except FileNotFoundError:
        left_out.append(f"{name} was deleted meanwhile")


def _add(tar: tarfile.TarFile, path: str, name: str, status: os.stat_result) -> bool:
    """Add one thing; False if it is of no kind that is copied."""
    info = tarfile.TarInfo(name)
    info.mode = status.st_mode & _PERMISSIONS
    info.mtime = status.st_mtime
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    elif stat.S_ISLNK(status.st_mode):
        info.type = tarfile.SYMTYPE
        info.linkname = os.readlink(path)
        tar.addfile(info)
    elif stat.S_ISREG(status.st_mode):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            info.size = os.fstat(fd).st_size
            tar.addfile(info, _Exactly(file, info.size))  # type: ignore[arg-type]
    else:
        return False
    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
    return True


class _Exactly:
    """Reads as many bytes as a file had when it was opened: zeros for those it has lost since."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        data: bytes = self._file.read(size)
        self._left -= len(data) or size
        return data or bytes(size)


# Unpacking


class _Folder:
    """A folder, entered name by name from another one, never through a link."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> _Folder:  # noqa: PYI034  (Self is too new for some images)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def enter(self, name: str, *, make: bool = False) -> None:
        """Go one down.

        Raises:
            TransferError: that is a link, or no folder.
        """
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=self.fd)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        except FileNotFoundError:
            raise TransferError(f"there is no {name}") from None
        except OSError as error:
            why = "a link, which is not followed" if self.kind(name) == stat.S_IFLNK else error.strerror
            raise TransferError(f"{name} is in the way: {why}") from None
        os.close(self.fd)
        self.fd = fd

    def kind(self, name: str) -> int:
        """What is there, as in ``stat.S_IFMT``; 0 for nothing."""
        try:
            return stat.S_IFMT(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return 0


def unpack(source: BinaryIO, root: str, path: str, name: str | None, *, careful: bool = False) -> list[str]:
    """Make what a stream holds below the folder ``root``, at ``path``; returns what was left out, and why.

    In a folder that is there, or if ``path`` ends with a slash, it becomes ``name``; without a name its content goes into the
    folder itself. What is in the way of a file or link is replaced, unless it is a folder. ``careful`` leaves links out that
    lead out of what is copied.

    Raises:
        TransferError: it is damaged, or would write elsewhere.
        OSError: it cannot be written.
    """
    with _Folder(root) as parent:
        target = _enter_parent(parent, _relative(root, path), name)
        with tarfile.open(fileobj=source, mode="r|", bufsize=_RECORD, errors="surrogateescape") as tar:
            return _Unpacking(tar, parent, target, careful=careful).run()


def _enter_parent(folder: _Folder, path: str, name: str | None) -> str:
    """Enter the folder that the copy goes into, which is made if need be; returns its name there."""
    *names, last = parts_of(path) or [""]
    for each in names:
        folder.enter(each, make=True)
    if name is None:
        return last or "."
    if last and not path.endswith("/") and folder.kind(last) != stat.S_IFDIR:
        return last
    if last:
        folder.enter(last, make=True)
    return name


class _Unpacking:
    """One tree on its way to the disk."""

    def __init__(self, tar: tarfile.TarFile, parent: _Folder, target: str, *, careful: bool) -> None:
        self._tar = tar
        self._parent = parent
        self._target = target
        self._careful = careful
        self._left_out: list[str] = []
        #: Folders get their permissions at last: that of making something in them may be missing.
        self._folders: list[tuple[list[str], tarfile.TarInfo]] = []

    def run(self) -> list[str]:
        first = True
        while (member := self._tar.next()) is not None:
            self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            names = parts_of(member.name)
            if first != (not names):
                raise TransferError("what arrives is no copy of anything")
            self._make(names, member)
            first = False
        if first:
            raise TransferError("nothing has arrived")
        for names, member in reversed(self._folders):
            self._finish(names, member)
        return self._left_out

    def _enter(self, names: list[str]) -> _Folder:
        """The folder below the root of the copy that ``names`` lead to."""
        folder = _Folder(
            f"/proc/self/fd/{self._parent.fd}" if sys.platform == "linux" else f"/dev/fd/{self._parent.fd}"
        )
        try:
            for name in names:
                folder.enter(name)
        except BaseException:
            folder.__exit__()
            raise
        return folder

    def _make(self, names: list[str], member: tarfile.TarInfo) -> None:
        path = [self._target, *names]
        with self._enter(path[:-1]) as folder:
            if member.isdir():
                self._make_folder(folder, path, member)
            elif member.issym():
                self._make_link(folder, names, path[-1], member)
            elif member.isreg():
                self._make_file(folder, path[-1], member)
            else:
                raise TransferError(f"{member.name} is neither a file nor a folder nor a link")

    def _make_folder(self, folder: _Folder, path: list[str], member: tarfile.TarInfo) -> None:
        if path[-1] != ".":
            folder.enter(path[-1], make=True)
            self._folders.append((path, member))

    def _finish(self, path: list[str], member: tarfile.TarInfo) -> None:
        with self._enter(path) as folder:
            os.fchmod(folder.fd, member.mode & _PERMISSIONS)

    def _clear(self, folder: _Folder, name: str) -> None:
        kind = folder.kind(name)
        if kind == stat.S_IFDIR:
            raise TransferError(f"{name} is in the way: it is a folder")
        if kind:
            os.unlink(name, dir_fd=folder.fd)

    def _make_link(self, folder: _Folder, names: list[str], name: str, member: tarfile.TarInfo) -> None:
        if self._careful and _leaves(names, member.linkname):
            self._left_out.append(
                f"the link {'/'.join(names) or name} -> {member.linkname} leads out of what is copied"
            )
            return
        self._clear(folder, name)
        os.symlink(member.linkname, name, dir_fd=folder.fd)

    def _make_file(self, folder: _Folder, name: str, member: tarfile.TarInfo) -> None:
        self._clear(folder, name)
        source: Any = self._tar.extractfile(member)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder.fd)
        with open(fd, "wb", buffering=0) as out:
            while block := source.read(_BUFFER):
                view = memoryview(block)
                while view:
                    view = view[out.write(view) :]
            os.fchmod(fd, member.mode & _PERMISSIONS)
            os.utime(fd, (member.mtime, member.mtime))


def _leaves(names: list[str], target: str) -> bool:
    """Whether a link may lead out of the copy. Going up is only certain at its beginning: after a name it may follow a link."""
    steps = [step for step in target.split("/") if step not in {"", "."}]
    climbs = next((index for index, step in enumerate(steps) if step != ".."), len(steps))
    return target.startswith("/") or climbs >= max(len(names), 1) or ".." in steps[climbs:]
