"""An image's definition as the builder takes it: Dockerfile, build context, and the hash that names the result.

Pure but for reading the files that ``copy`` steps name. Arguments never reach a shell or the builder's variable expansion
unless they are meant to: commands and file names travel as JSON arrays.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helmr.errors import ImageError
from helmr.sandbox import SECRET_RUN, Step
from worker.engine import ImageSpec

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"[a-z0-9_][a-z0-9_.-]*(:[a-z0-9_][a-z0-9_.-]*)?")


class ContextFile(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the build context: its name there and the file, folder or link it is."""

    name: str
    path: Path


def dockerfile(spec: ImageSpec, base: str) -> str:
    """The Dockerfile for ``spec`` upon ``base``, an image the engine has.

    Raises:
        ImageError: a step is not one that Helmr knows, or lacks an argument.
    """
    lines = [f"FROM {base}"]
    for number, (kind, *arguments) in enumerate(spec.steps):
        if kind not in _STEPS or not arguments:
            raise ImageError(
                f"image step {number + 1} is not understood: {[kind, *arguments]!r}",
                hint=f"a step is one of {', '.join(_STEPS)}, with arguments",
            )
        lines += _STEPS[kind](number, arguments)
    return "\n".join(lines) + "\n"


def parts(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """The steps in parts that are built one upon the other, in order: a step with secrets is a part of its own."""
    for secret, group in itertools.groupby(steps, lambda step: step[0] == SECRET_RUN):
        if secret:
            yield from ((step,) for step in group)
        else:
            yield tuple(group)


def context_files(spec: ImageSpec) -> list[ContextFile]:
    """What the ``copy`` steps need, each step's source below a folder of its own (its number).

    Raises:
        ImageError: a source is missing, or lies outside the deployment.
    """
    found: list[ContextFile] = []
    for number, (kind, *arguments) in enumerate(spec.steps):
        if kind == "copy":
            source = _source(spec.context, arguments[0])
            found += _walk(source, _context_name(number, arguments[0]))
    return found


def content_hash(text: str, base_id: str, files: list[ContextFile]) -> str:
    """64 hex digits over the Dockerfile, the base's identity and the copied files (names, modes, bytes; not times)."""
    digest = hashlib.sha256(f"{base_id}\n{text}".encode())
    for file in files:
        info = file.path.lstat()
        digest.update(f"\0{file.name}\0{_mode(info):o}\0".encode())
        digest.update(_content_digest(file.path, info))
    return digest.hexdigest()


def context(text: str, files: list[ContextFile]) -> bytes:
    """The tar archive the builder takes; equal content gives equal bytes, so that its cache works."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(text.encode())
        out.addfile(entry, io.BytesIO(text.encode()))
        for file in files:
            _add(out, file)
    return buffer.getvalue()


def _add(out: tarfile.TarFile, file: ContextFile) -> None:
    entry = out.gettarinfo(file.path, file.name)
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime, entry.mode = 0, _mode(file.path.lstat())
    if entry.isreg():
        with file.path.open("rb") as data:
            out.addfile(entry, data)
    else:
        out.addfile(entry)


def _mode(info: os.stat_result) -> int:
    """Only what git would keep of a mode: umask and checkout must not change an image's hash."""
    return 0o755 if stat.S_ISDIR(info.st_mode) or info.st_mode & 0o100 else 0o644


def _content_digest(path: Path, info: os.stat_result) -> bytes:
    if stat.S_ISLNK(info.st_mode):
        return os.fsencode(path.readlink())
    if stat.S_ISDIR(info.st_mode):
        return b""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").digest()


def _source(root: Path | None, name: str) -> Path:
    if root is None:
        raise ImageError(f"nothing to copy {name!r} from: this image was defined without a task project")
    path, base = (root / name).resolve(), root.resolve()
    if not path.is_relative_to(base):
        raise ImageError(
            f"cannot copy {name!r}: it lies outside the task project", hint="copy it into the project first"
        )
    if not path.exists():
        raise ImageError(
            f"cannot copy {name!r}: the deployment has no such file or folder",
            hint="see `ignore` in helmr.toml and .helmrignore",
        )
    return path


def _walk(path: Path, name: str) -> Iterator[ContextFile]:
    kind = path.lstat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISLNK(kind)):
        raise ImageError(f"cannot copy {path.name!r}: neither a file nor a folder")
    yield ContextFile(name=name, path=path)
    if stat.S_ISDIR(kind):
        for child in sorted(path.iterdir()):
            yield from _walk(child, f"{name}/{child.name}")


def _context_name(number: int, source: str) -> str:
    return f"{number}/{Path(source).name or 'all'}"


def _run(_: int, arguments: list[str]) -> list[str]:
    return [f"RUN {json.dumps(['/bin/sh', '-c', ' '.join(arguments)])}"]


def _apt(number: int, arguments: list[str]) -> list[str]:
    install = f"apt-get install -y --no-install-recommends {' '.join(arguments)}"
    return _run(number, [f"apt-get update && {install} && rm -rf /var/lib/apt/lists/*"])


def _pip(_: int, arguments: list[str]) -> list[str]:
    return [f"RUN {json.dumps(['python3', '-m', 'pip', 'install', '--no-cache-dir', *arguments])}"]


def _copy(number: int, arguments: list[str]) -> list[str]:
    if len(arguments) != 2:
        raise ImageError(f"a copy step takes a source and a destination, not {arguments!r}")
    return [f"COPY {json.dumps([_context_name(number, arguments[0]), arguments[1]])}"]


def _env(_: int, arguments: list[str]) -> list[str]:
    lines = []
    for word in arguments:
        name, equals, value = word.partition("=")
        if not equals or not _ENV_NAME.fullmatch(name) or "\n" in value:
            raise ImageError(f"an env step takes NAME=value without line breaks, not {word!r}")
        lines.append(f'ENV {name}="{_literal(value)}"')
    return lines


def _workdir(_: int, arguments: list[str]) -> list[str]:
    if len(arguments) != 1 or "\n" in arguments[0]:
        raise ImageError(f"a workdir step takes one path, not {arguments!r}")
    return [f"WORKDIR {_literal(arguments[0])}"]


def _user(_: int, arguments: list[str]) -> list[str]:
    if len(arguments) != 1 or not _USER.fullmatch(arguments[0]):
        raise ImageError(f"a user step takes one user, not {arguments!r}")
    return [f"USER {arguments[0]}"]


def _literal(value: str) -> str:
    return re.sub(r'(["\\$])', r"\\\1", value)


_STEPS = {"run": _run, "apt": _apt, "pip": _pip, "copy": _copy, "env": _env, "workdir": _workdir, "user": _user}
