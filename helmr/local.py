"""Where the local server is: a small file in the home folder that the server writes and everybody else reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helmr.errors import Unavailable

_NAME = "connection.json"
_HINT = "start it with `helmr dev` (or `helmr server`), or set HELMR_URL"


def announce(home: Path, url: str) -> None:
    """Write the file, atomically; the writer's process id tells readers whether it still means anything."""
    scratch = home / f".{_NAME}.{os.getpid()}"
    scratch.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    scratch.chmod(0o600)
    scratch.replace(home / _NAME)


def withdraw(home: Path) -> None:
    """Remove the file, if it is ours."""
    path = home / _NAME
    try:
        if json.loads(path.read_text())["pid"] == os.getpid():
            path.unlink()
    except (OSError, ValueError, KeyError):
        return  # nothing there, or somebody else's


def find(home: Path) -> str:
    """The URL of the local server.

    Raises:
        Unavailable: none runs over this home folder.
    """
    try:
        found = json.loads((home / _NAME).read_text())
        _require_alive(found["pid"])
    except FileNotFoundError:
        raise Unavailable(f"no Helmr server runs here (home: {home})", hint=_HINT) from None
    except ProcessLookupError:
        raise Unavailable(f"the Helmr server of {home} is gone (it left its connection file)", hint=_HINT) from None
    except (OSError, ValueError, KeyError) as error:
        raise Unavailable(f"cannot read {home / _NAME}: {error}", hint=_HINT) from error
    return str(found["url"])


def _require_alive(pid: int) -> None:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return  # somebody else's process: it is alive
