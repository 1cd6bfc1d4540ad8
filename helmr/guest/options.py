"""How a supervisor is told what to do: its command line, what every process gets of it, and the folders it needs."""

from __future__ import annotations

import os

from helmr.guest.doors import proxy_environment

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Options:
    """The command line, by hand: argparse costs more than all the rest of the start."""

    def __init__(self, arguments: list[str]) -> None:
        given = dict(zip(arguments[::2], arguments[1::2], strict=False))
        self.socket = given.pop("--socket", "")
        self.workspace = os.path.abspath(given.pop("--workspace", "."))
        self.workspace_id = given.pop("--workspace-id", "")
        self.sources = given.pop("--sources", "")
        self.uid = given.pop("--uid", "")
        self.gid = given.pop("--gid", self.uid)
        self.home = given.pop("--home", "/tmp/home")  # noqa: S108  (a container's own tmpfs)
        self.orphan_timeout = float(given.pop("--orphan-timeout", "60"))
        self.stop_grace = float(given.pop("--stop-grace", "2"))
        self.secret_root = given.pop("--secret-root", "")
        self.way_out = given.pop("--way-out", "")
        self.runner = given.pop("--runner", "helmr.guest.runner:main")
        if given or len(arguments) % 2 or not self.socket:
            raise SystemExit(f"supervisor: unknown option, or no --socket: {' '.join(arguments)}")

    @property
    def owner(self) -> tuple[int, int] | None:
        """Who tasks run as; None: as whoever runs the supervisor."""
        return (int(self.uid), int(self.gid)) if self.uid else None

    def environment(self) -> dict[str, str]:
        """What every process gets: the image's own environment, and the few things a program relies on."""
        root = {"HELMR_SECRET_ROOT": self.secret_root} if self.secret_root else {}
        return {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            **os.environ,
            **(proxy_environment() if self.way_out else {}),
            "HOME": self.home,
            "HELMR_WORKSPACE": self.workspace,
            "HELMR_WORKSPACE_ID": self.workspace_id,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **root,
        }


def prepare(options: Options) -> None:
    """Make the workspace's root (that folder alone) and the home folder belong to the tasks' user."""
    os.makedirs(options.home, mode=0o700, exist_ok=True)
    if options.owner is None:
        return
    for folder in (options.workspace, options.home):
        status = os.stat(folder)
        if (status.st_uid, status.st_gid) != options.owner:
            os.chown(folder, *options.owner)
