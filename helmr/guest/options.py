"""How a supervisor is told what to do: its command line, what every process gets of it, and the folders it needs."""

from __future__ import annotations

import os

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


#: Where proxies usually listen. The machine's loopback interface is its own: the number is free.
PROXY_PORT = 3128
#: What makes programs use the proxy; lower case for curl, which heeds nothing else for plain HTTP.
_PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


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

    def settings(self) -> list[str]:
        """What the zygote is told on its command line."""
        return [self.workspace, self.sources, self.uid, self.gid, self.runner]

    def environment(self) -> dict[str, str]:
        """What every process gets: the image's own environment, and the few things a program relies on."""
        root = {"HELMR_SECRET_ROOT": self.secret_root} if self.secret_root else {}
        return {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            **os.environ,
            **(_proxy_environment() if self.way_out else {}),
            "HOME": self.home,
            "HELMR_WORKSPACE": self.workspace,
            "HELMR_WORKSPACE_ID": self.workspace_id,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            **root,
        }


def _proxy_environment() -> dict[str, str]:
    """What every process is told about the way out."""
    url = f"http://127.0.0.1:{PROXY_PORT}"
    named = dict.fromkeys(_PROXY_NAMES, url)
    local = "localhost,127.0.0.1,::1"
    return {**named, "NO_PROXY": local, "no_proxy": local, "NODE_USE_ENV_PROXY": "1"}


def prepare(options: Options) -> None:
    """Make the workspace's root (that folder alone) and the home folder belong to the tasks' user."""
    os.makedirs(options.home, mode=0o700, exist_ok=True)
    if options.owner is None:
        return
    for folder in (options.workspace, options.home):
        status = os.stat(folder)
        if (status.st_uid, status.st_gid) != options.owner:
            os.chown(folder, *options.owner)
