"""Makes the index of a task project by importing its modules in a child process, and survives whatever they do there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

import helmr
from helmr import errors
from helmr.errors import ProjectError
from helmr.index import Index
from helmr.project import Archive, unpack

#: Importing the modules of a project may take this long, in seconds.
TIMEOUT = 60.0

# -P: the project must not shadow what the indexer itself imports, so its folder is put first only afterwards.
_BOOT = "import sys; sys.path.append(sys.argv[1]); from helmr.indexer import main; main(sys.argv[2:])"

#: How much of what the modules printed is shown when they end the process.
_SHOWN_OUTPUT = 2000


class _Answer(msgspec.Struct):
    index: Index | None = None
    error: dict[str, Any] | None = None


def index_archive(archive: Archive, modules: Sequence[str], *, timeout: float = TIMEOUT) -> Index:
    """The index of exactly what was packed, so that a file left out by an ignore rule is missed now, not by a run.

    Raises:
        ProjectError: see :func:`index_project`.
    """
    with tempfile.TemporaryDirectory(prefix="helmr-index-") as folder:
        root = Path(folder) / "project"
        unpack(archive.data, root)
        return index_project(root, modules, timeout=timeout)


def index_project(root: Path, modules: Sequence[str], *, timeout: float = TIMEOUT) -> Index:
    """Import ``modules`` (names or folders, relative to ``root``) in a child process and return what they declare.

    Blocks; asynchronous callers use a thread. The modules are imported with an empty working folder, because a run has
    another one, too, and write no bytecode.

    Raises:
        ProjectError: a module is missing, broken or slow, declarations contradict each other, or there is no task. The
            message names file and line, and repeats the reason in the module's own words.
    """
    root = root.resolve()
    with tempfile.TemporaryDirectory(prefix="helmr-cwd-") as cwd, tempfile.TemporaryFile() as result, _output() as said:
        command = [sys.executable, "-P", "-c", _BOOT, str(_package_root()), str(result.fileno()), str(root), *modules]
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=(result.fileno(),),
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProjectError(
                f"importing {', '.join(modules)} took more than {timeout:g} seconds",
                hint="modules should only define things; do the work inside the tasks",
            ) from None
        finally:
            _end(process)
        result.seek(0)
        return _index(result.read(), code, said)


def _output() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _package_root() -> Path:
    return Path(helmr.__file__).parents[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever the modules have started ends with them: the child leads a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _index(answer: bytes, code: int, said: IO[bytes]) -> Index:
    if not answer:
        said.seek(0, os.SEEK_END)
        said.seek(max(0, said.tell() - _SHOWN_OUTPUT))
        output = said.read().decode("utf-8", "replace").strip()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ProjectError(
            f"a module ended the process that imported it ({how})" + (f"; it said: {output}" if output else ""),
            hint="modules should only define things; do the work inside the tasks",
        )
    found = msgspec.json.decode(answer, type=_Answer)
    if found.error is not None:
        raise errors.from_dict(found.error)
    if found.index is None:
        raise ProjectError("the index of the project is empty")
    return found.index
