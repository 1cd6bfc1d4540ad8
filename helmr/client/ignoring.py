"""Which files of a local folder are copied into a workspace: not those that its ignore files name."""

from __future__ import annotations

from pathlib import Path

import pathspec

from helmr.project import IGNORE_FILE

_GIT_IGNORE_FILE = ".gitignore"


class Ignored:
    """What ``.gitignore`` files (of the folder, and of those in it) and the folder's ``.helmrignore`` leave out.

    As with git, a file that lies deeper has the last word, and so has a later line; ``.helmrignore`` comes after all others.
    The folder ``.git`` itself is copied: whoever works in the workspace may want it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own = _read(root / IGNORE_FILE)
        self._specs: dict[str, pathspec.GitIgnoreSpec | None] = {}

    def chosen(self, name: str, is_folder: bool) -> bool:
        """Whether this path, relative to the folder, is copied."""
        verdict: bool | None = None
        steps = name.split("/")
        for depth in range(len(steps)):
            spec = self._spec("/".join(steps[:depth]))
            verdict = _verdict(spec, "/".join(steps[depth:]), is_folder=is_folder, before=verdict)
        return not _verdict(self._own, name, is_folder=is_folder, before=verdict)

    def _spec(self, folder: str) -> pathspec.GitIgnoreSpec | None:
        if folder not in self._specs:
            self._specs[folder] = _read(self._root / folder / _GIT_IGNORE_FILE)
        return self._specs[folder]


def _verdict(spec: pathspec.GitIgnoreSpec | None, name: str, *, is_folder: bool, before: bool | None) -> bool | None:
    if spec is None:
        return before
    found = spec.check_file(f"{name}/" if is_folder else name).include
    return before if found is None else found


def _read(path: Path) -> pathspec.GitIgnoreSpec | None:
    if path.is_symlink() or not path.is_file():
        return None
    return pathspec.GitIgnoreSpec.from_lines(path.read_text("utf-8", "replace").splitlines())
