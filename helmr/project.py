"""The source archive of a task project: which files belong to it, packed so that the same files give the same hash."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec
import pathspec

from helmr.errors import ProjectError, TooLarge

#: All files of a project together, in bytes, before compression.
SIZE_LIMIT = 64 * 1024 * 1024
FILE_LIMIT = 20_000
IGNORE_FILE = ".helmrignore"

#: Patterns as in .gitignore. Version control, environments, caches; and .env files, which hold secrets.
DEFAULT_IGNORE = (
    ".git",
    ".hg",
    ".svn",
    ".venv",
    "__pycache__",
    "*.pyc",
    ".env*",
    "node_modules",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".DS_Store",
    IGNORE_FILE,
)

# A tar of SIZE_LIMIT bytes: a header of 512 bytes, padding, and for long names two more blocks, for each file.
_TAR_LIMIT = SIZE_LIMIT + FILE_LIMIT * 4096


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A packed project: ``data`` is a tar.gz, ``digest`` the sha-256 of the tar within.

    The digest leaves out the compression, whose bytes differ between versions of zlib.
    """

    data: bytes
    digest: str
    files: int
    size: int  #: bytes of all files


class Rules:
    """Which files of a folder belong to the project: not those that its ignore patterns match.

    Patterns mean what they mean in ``.gitignore``; later ones win, so ``!name`` brings back what an earlier one left out. The
    order is :data:`DEFAULT_IGNORE`, ``ignore`` of ``helmr.toml``, ``.helmrignore``.
    """

    def __init__(self, root: Path, ignore: Sequence[str] = ()) -> None:
        self.root = root
        file = root / IGNORE_FILE
        lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
        self._spec = pathspec.GitIgnoreSpec.from_lines([*DEFAULT_IGNORE, *ignore, *lines])

    def ignores(self, name: str, *, folder: bool = False) -> bool:
        """Whether this path, relative to the project and with ``/``, is left out."""
        return self._spec.match_file(f"{name}/" if folder else name)

    def names(self) -> list[str]:
        """The paths of the files and links that belong to the project, relative, sorted."""
        return sorted(self._within(self.root, ""))

    def _within(self, folder: Path, prefix: str) -> Iterator[str]:
        try:
            entries = list(os.scandir(folder))
        except PermissionError as failure:
            raise _unreadable(prefix or ".") from failure
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if not self.ignores(name, folder=True):
                    yield from self._within(folder / entry.name, f"{name}/")
            elif (entry.is_symlink() or entry.is_file(follow_symlinks=False)) and not self.ignores(name):
                yield name  # sockets, pipes and devices are not source


def pack(root: Path, ignore: Sequence[str] = ()) -> Archive:
    """Pack the project in ``root``; the same files, modes and links give the same digest, wherever and whenever.

    Raises:
        ProjectError: a link leaves the project, or a file cannot be read.
        TooLarge: the files are more than 64 MiB together, or too many.
    """
    names = Rules(root, ignore).names()
    _check_size(root, names)
    buffer = io.BytesIO()
    size = count = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            added = _add(tar, root, name)
            if added is not None:
                size, count = size + added, count + 1
    plain = buffer.getvalue()
    return Archive(
        data=gzip.compress(plain, compresslevel=6, mtime=0),
        digest=hashlib.sha256(plain).hexdigest(),
        files=count,
        size=size,
    )


def _check_size(root: Path, names: list[str]) -> None:
    sizes = sorted(((_size(root / name), name) for name in names), reverse=True)
    total = sum(size for size, _ in sizes)
    if total <= SIZE_LIMIT and len(names) <= FILE_LIMIT:
        return
    largest = ", ".join(f"{name} ({_mib(size)})" for size, name in sizes[:5])
    what = f"{_mib(total)} in {len(names):,} files"
    raise TooLarge(
        f"the project is too large: {what}; at most {_mib(SIZE_LIMIT)} and {FILE_LIMIT:,} files can be deployed",
        hint=f"leave out what tasks do not need with {IGNORE_FILE}; the largest files are {largest}",
        details={"largest": [name for _, name in sizes[:5]], "size": total, "files": len(names)},
    )


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _mib(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


def _unreadable(name: str) -> ProjectError:
    return ProjectError(
        f"{name} cannot be read: permission denied", hint=f"change its mode, or leave it out with {IGNORE_FILE}"
    )


def _add(tar: tarfile.TarFile, root: Path, name: str) -> int | None:
    """Add one file or link and return its size; None if it has gone meanwhile: editors come and go."""
    path = root / name
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ProjectError(f"{name!r} is not a name in UTF-8", hint="rename the file") from None
    entry = tarfile.TarInfo(name)
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            entry.type, entry.linkname = tarfile.SYMTYPE, _inner_target(name, str(path.readlink()))
            tar.addfile(entry)
            return 0
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError as failure:
        raise _unreadable(name) from failure
    entry.mode = 0o755 if mode & 0o111 else 0o644
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
    return len(data)


def _inner_target(name: str, target: str) -> str:
    """The target of a link, if it is certain to stay inside.

    Going up is only allowed at its beginning: after a name it could pass through another link, and then ``..`` leads
    elsewhere than it seems to.
    """
    parts = PurePosixPath(target).parts
    depth = len(PurePosixPath(name).parts) - 1
    climbs = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    if target.startswith("/") or climbs > depth or ".." in parts[climbs:] or not parts:
        raise ProjectError(
            f"the link {name} -> {target} leaves the project",
            hint=f"make it a relative link to something inside, or leave it out with {IGNORE_FILE}",
        )
    return str(PurePosixPath(target))


class _Capped(io.RawIOBase):
    """A stream that ends in an error after so many bytes: a small archive can claim to hold terabytes."""

    def __init__(self, inner: gzip.GzipFile, limit: int) -> None:
        self._inner = inner
        self._left = limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise TooLarge("the archive holds more than a project may")
        return data


def unpack(data: bytes, dest: Path) -> None:
    """Unpack an archive into the folder ``dest``, which must not exist yet.

    The archive is not trusted: only files and links are made, nothing outside of ``dest``, nothing through a link, with no
    modes but 0644 and 0755. After an error ``dest`` is incomplete and to be removed.

    Raises:
        ProjectError: it is damaged, or contains what :func:`pack` never makes.
        TooLarge: it holds more than a project may.
    """
    dest.mkdir(parents=True)
    base = os.open(dest, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as plain:
            stream = _Capped(plain, _TAR_LIMIT)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for count, entry in enumerate(tar, 1):
                    if count > FILE_LIMIT:
                        raise TooLarge("the archive holds more files than a project may")
                    _extract(tar, entry, base)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, OSError) as failure:
        raise ProjectError(f"the archive cannot be unpacked: {failure}") from failure
    finally:
        os.close(base)


def _extract(tar: tarfile.TarFile, entry: tarfile.TarInfo, base: int) -> None:
    parts = entry.name.split("/")
    if not parts or {"", ".", ".."} & set(parts) or "\0" in entry.name:
        raise ProjectError(f"the archive contains the path {entry.name!r}")
    folder = _folder(base, parts[:-1])
    try:
        if entry.issym():
            os.symlink(_inner_target(entry.name, entry.linkname), parts[-1], dir_fd=folder)
        elif entry.isreg():
            _write(tar, entry, parts[-1], folder)
        else:
            raise ProjectError(f"the archive contains {entry.name!r}, which is neither file nor link")
    finally:
        os.close(folder)


def _folder(base: int, parts: list[str]) -> int:
    """A descriptor of the folder, made if need be; never through a link."""
    folder = os.dup(base)
    for part in parts:
        try:
            os.mkdir(part, 0o755, dir_fd=folder)
        except FileExistsError:
            pass
        finally:
            parent = folder
        try:
            folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        finally:
            os.close(parent)
    return folder


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, name: str, folder: int) -> None:
    mode = 0o755 if entry.mode & 0o111 else 0o644
    source = tar.extractfile(entry)
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)
    with open(fd, "wb") as out:  # noqa: PTH123  a descriptor has no path
        os.fchmod(fd, mode)
        while source is not None and (block := source.read(1024 * 1024)):
            out.write(block)
