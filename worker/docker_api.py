"""The Docker SDK made fit for asyncio: few threads, one client each, an agreed API version, timeouts, Helmr's errors.

The SDK's client is not safe to share between threads, its calls block, and its exceptions come from three libraries.
All of that ends here. Only control calls pass through; nothing ever attaches to a container, because an attached reader
that stops reading wedges it (moby issue 41827).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import docker.errors
import requests.exceptions
from docker import APIClient
from docker.utils import kwargs_from_env

from helmr.errors import Conflict, EngineUnavailable, HelmrError, NotFound

T = TypeVar("T")

#: Control calls take milliseconds; creating or removing a container on a loaded machine takes seconds.
CALL_TIMEOUT = 60.0
#: The first question to an engine; one that takes longer is as good as none.
VERSION_TIMEOUT = 10.0
#: Threads, and so clients: enough for a few starts and a build at once on a small machine.
THREADS = 8
#: The API this code was written for (Engine 20.10) and the newest the SDK speaks; in between the engine decides.
OLDEST_API = (1, 41)
NEWEST_API = (1, 45)

#: How an engine that is being stopped words it, or one of which a part has ended: containerd, or what watches over a container.
_BROKEN = re.compile(
    r"containerd|ttrpc|shim disconnected|start shim|transport is closing|context canceled|shutting down", re.IGNORECASE
)

_START_DOCKER = "start Docker (./scripts/engine, or `systemctl start docker`), set DOCKER_HOST, or use --engine process"


class EngineSilent(EngineUnavailable):
    """The engine has taken a request, and no answer came in time; it may still do what was asked."""


class Interrupt:
    """Ends a streaming call from outside its thread: the engine gives up a build or pull when its client hangs up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.set = False

    def watch(self, response: requests.Response, *_: Any, **__: Any) -> None:
        """Remember the connection of a response (a hook for ``requests``, called before the body is read)."""
        with self._lock:
            self._socket = getattr(getattr(response.raw, "connection", None), "sock", None)
        if self.set:
            self()

    def __call__(self) -> None:
        """Hang up; harmless at any time and more than once."""
        self.set = True
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


class DockerApi:
    """The engine's API, one call at a time or many at once; build one per worker and :meth:`close` it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="docker")
        self._local = threading.local()
        self._clients: list[APIClient] = []
        self._lock = threading.Lock()
        self._version: str | None = None

    async def call(self, function: Callable[[APIClient], T], *, patience: float = CALL_TIMEOUT) -> T:
        """Run ``function`` with this thread's client; ``patience`` seconds for each answer of the engine.

        A cancelled caller waits for the call to end: it may have created something that the caller must then remove.

        Raises:
            EngineUnavailable: no engine answers; if it is there, and silent, an :class:`EngineSilent`.
            NotFound, Conflict, HelmrError: what the engine said.
        """
        return await self._in_thread(lambda: function(self._client(patience)))

    async def stream(
        self, request: Callable[[APIClient], Iterable[dict[str, Any]]], each: Callable[[dict[str, Any]], None]
    ) -> None:
        """Make a streaming request (build, pull); ``each`` gets every JSON object, in the caller's loop and in order.

        Cancelling hangs up at once, which makes the engine give the work up. A step may be silent for as long as it takes, if
        only the engine answers others meanwhile.

        Raises:
            EngineUnavailable: it does not, or has gone.
        """
        loop = asyncio.get_running_loop()
        interrupt = Interrupt()

        def work() -> None:
            with contextlib.closing(self._connect(timeout=None)) as client:
                client.hooks["response"].append(interrupt.watch)
                for item in request(client):
                    if interrupt.set:
                        return
                    loop.call_soon_threadsafe(each, item)

        streaming = asyncio.ensure_future(self._in_thread(work, interrupt))
        try:
            while not (await asyncio.wait({streaming}, timeout=CALL_TIMEOUT))[0]:
                await asyncio.to_thread(_translated, self._ping)
        finally:
            streaming.cancel()
            await asyncio.wait({streaming})
        streaming.result()
        # The thread's last callbacks were queued before its result; let them run.
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Let calls that are under way end, then close every client."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        for client in self._clients:
            client.close()

    async def _in_thread(self, work: Callable[[], T], interrupt: Interrupt | None = None) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._threads, _translated, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if interrupt is not None:
                interrupt()
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # seen: the caller was cancelled, what the call said no longer matters
            raise

    def _ping(self) -> None:
        with contextlib.closing(self._connect(CALL_TIMEOUT)) as client:
            client.ping()

    def _client(self, patience: float) -> APIClient:
        client: APIClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self._connect(patience)
            with self._lock:
                self._clients.append(client)
        client.timeout = patience  # type: ignore[assignment]
        return client

    def _connect(self, timeout: float | None) -> APIClient:
        where = connection()
        _knock(str(where["base_url"]))
        with self._lock:
            if self._version is None:
                self._version = _agree_version(where)
        return APIClient(version=self._version, timeout=timeout, **where)  # type: ignore[arg-type]


def connection() -> dict[str, Any]:
    """How to reach the engine: ``DOCKER_HOST`` and its TLS variables, else the usual sockets of this machine."""
    where = dict(kwargs_from_env())
    if "base_url" not in where:
        where["base_url"] = f"unix://{socket_path()}"
    return where


def socket_path() -> Path:
    """The engine's socket when ``DOCKER_HOST`` is not set: the system's, a rootless engine's or Docker Desktop's."""
    system = Path("/var/run/docker.sock")
    own = [Path(os.environ["XDG_RUNTIME_DIR"]) / "docker.sock"] if "XDG_RUNTIME_DIR" in os.environ else []
    desktop = Path.home() / ".docker/run/docker.sock"
    return next((path for path in (system, *own, desktop) if path.is_socket()), system)


def _knock(base_url: str) -> None:
    """Connect to a local engine, once, by ourselves: the SDK leaves its socket open when that fails."""
    if base_url.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as attempt:
            try:
                attempt.connect(base_url.removeprefix("unix://"))
            except OSError as error:
                raise _unreachable(error) from error


def _agree_version(where: dict[str, Any]) -> str:
    client = APIClient(version="1.24", timeout=VERSION_TIMEOUT, **where)  # type: ignore[arg-type]
    with contextlib.closing(client):
        answer = client.version(api_version=False)
    newest, oldest = _numbers(answer["ApiVersion"]), _numbers(answer.get("MinAPIVersion", "1.12"))
    if newest < OLDEST_API:
        raise EngineUnavailable(
            f"the Docker engine {answer.get('Version')} is too old (API {answer['ApiVersion']})",
            hint="install Docker Engine 20.10 or newer",
        )
    return ".".join(map(str, max(oldest, min(newest, NEWEST_API))))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _translated(work: Callable[[], T]) -> T:
    try:
        return work()
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise translate(error) from error


async def remove_container(api: DockerApi, ref: str) -> None:
    """Kill and remove a container, with the anonymous volumes of its image; return when it is gone."""
    with contextlib.suppress(NotFound):
        try:
            await api.call(lambda client: client.remove_container(ref, v=True, force=True))
        except Conflict:  # somebody else is removing it
            await api.call(lambda client: client.wait(ref, condition="removed"))


def translate(error: Exception) -> HelmrError:
    """The Helmr error for what the SDK, requests or the engine raised."""
    text = str(getattr(error, "explanation", None) or error)
    if isinstance(error, docker.errors.NotFound):
        return NotFound(text)
    if isinstance(error, docker.errors.APIError):
        if (error.status_code or 0) >= 500 and _BROKEN.search(text):
            return EngineUnavailable(f"the Docker engine is not whole: {text}", hint="see the log of dockerd")
        kind = Conflict if error.status_code == 409 else HelmrError
        return kind(f"the Docker engine refused: {text}", details={"status": error.status_code})
    if isinstance(error, requests.exceptions.Timeout):
        return EngineSilent(
            "the Docker engine did not answer in time", hint="see whether `docker ps` answers, and how loaded it is"
        )
    return _unreachable(error)


def _unreachable(error: Exception) -> EngineUnavailable:
    where = str(connection()["base_url"])
    cause = next((item for item in _causes(error) if isinstance(item, OSError) and item.errno), None)
    if isinstance(cause, PermissionError):
        return EngineUnavailable(
            f"no permission to use the Docker engine at {where}",
            hint="join the docker group (`sudo usermod -aG docker $USER`, log in again), or use --engine process",
        )
    reason = cause.strerror if cause is not None else str(error)
    return EngineUnavailable(f"no Docker engine answers at {where}: {reason}", hint=_START_DOCKER)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and everything it wraps; urllib3 and requests keep the original in ``args``, not in a chain."""
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        item = todo.pop()
        if any(item is known for known in seen):
            continue
        seen.append(item)
        yield item
        todo += [link for link in (*item.args, item.__cause__, item.__context__) if isinstance(link, BaseException)]


async def _main() -> int:
    api = DockerApi()
    try:
        version = await api.call(lambda client: client.version(api_version=False)["Version"], patience=10)
    except HelmrError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    finally:
        await api.close()
    print(f"Docker Engine {version} answers at {connection()['base_url']}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
