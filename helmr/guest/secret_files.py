"""Secrets as files: placed before a task is told to begin, and gone when the last process that was given them is.

They lie below ``/run``, which in a container is memory that only the supervisor may change; where there is no container,
below a folder of the machine's own. Two processes may be given the same path: the file stays until both have ended.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FOLDER = "/run/"


class SecretFiles:
    """The files of every process of this machine; ``root`` comes before each path, ``owner`` may read them."""

    def __init__(self, root: str, owner: tuple[int, int] | None) -> None:
        self._root = root
        self._owner = owner
        self._users: dict[str, set[int]] = {}

    def place(self, number: int, files: list[dict[str, Any]]) -> None:
        """Write the files of process ``number``.

        Raises:
            OSError: a file cannot be written, or its path is none that a secret may have.
        """
        for file in files:
            path = file["path"]
            if not path.startswith(_FOLDER) or os.path.normpath(path) != path:
                raise PermissionError(1, f"a secret cannot be put into {path}")
            self._users.setdefault(path, set()).add(number)
            self._write(self._root + path, file["value"].encode(), file["mode"], number)

    def release(self, number: int) -> None:
        """Remove the files that process ``number`` was the last to use."""
        for path, users in list(self._users.items()):
            users.discard(number)
            if not users:
                del self._users[path]
                try:
                    os.unlink(self._root + path)
                except OSError:
                    continue  # it was never written

    def clear(self) -> None:
        """Remove everything."""
        for number in set().union(*self._users.values()):
            self.release(number)

    def _write(self, path: str, value: bytes, mode: int, number: int) -> None:
        folder, name = os.path.split(path)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        draft = os.path.join(folder, f".{name}.{number}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as target:
                target.write(value)
                os.fchmod(target.fileno(), mode & 0o777)  # as its owner, which we are not afterwards
                if self._owner is not None:
                    os.fchown(target.fileno(), *self._owner)
            os.rename(draft, path)
        except OSError:
            os.unlink(draft)
            raise
