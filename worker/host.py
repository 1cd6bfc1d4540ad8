"""Which machine a workspace's files are on: an identity that outlives workers, kept in a file of ``HELMR_HOME``."""

from __future__ import annotations

import os
from pathlib import Path

from helmr import ids


def host_id(home: Path) -> str:
    """The id of this Helmr home on this machine (``host_01jd…``); created by whoever asks first, the same ever after.

    Not the host name: two machines may share one, and one machine may hold two homes with different workspaces.

    Raises:
        OSError: ``home`` cannot be read or written.
    """
    path = home / "host-id"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        home.mkdir(parents=True, exist_ok=True)
    draft = home / f".host-id.{os.getpid()}.{ids.new('host')}"
    draft.write_text(ids.new("host") + "\n")
    try:
        # A hard link appears whole and never replaces: of two first workers one wins, and both read its id.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_text().strip()
