"""Connections to NATS, with the defaults that experience asks for, and their errors translated."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import nats
import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from helmr.errors import NotAllowed, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 5.0
_CANCEL_AGAIN = 0.1
#: Seconds before the same error is worth another line.
_REPEAT_AFTER = 10.0
#: Where a URL without a port leads.
_PORTS = {"ws": 80, "wss": 443}
Callback = Callable[[], Awaitable[None]]
ErrorCallback = Callable[[Exception], Awaitable[None]]


T = TypeVar("T")


class _Client(Nats):
    """nats-py's client, which cannot be closed half way: what is left to send to a server that is away is dropped.

    Nor does it swallow cancellations (see :func:`heed_cancel`), nor stop reading at the answer to a flush that has timed out.
    """

    async def request(self, *args: Any, **options: Any) -> Msg:
        return await heed_cancel(super().request(*args, **options))

    async def flush(self, *args: Any, **options: Any) -> None:
        if self.is_connected:
            # nats-py's ping overtakes what waits to be written: a subscription made just now would not be there at its answer.
            await heed_cancel(self._flush_pending(force_flush=True))
        await heed_cancel(super().flush(*args, **options))

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            # Nobody waits for it any more: nats-py would fail, and its reader end.
            self._pongs.pop(0)
            self._pongs_received += 1
            self._pings_outstanding = 0
        else:
            await super()._process_pong()

    async def close(self) -> None:
        if not self.is_connected:
            self._pending: list[bytes] = []
            self._pending_data_size = 0
        try:
            await super().close()
        except ConnectionError as error:  # lost just now
            log.debug("closing: %s", error)


async def heed_cancel(work: Awaitable[T]) -> T:
    """Await ``work``, and be cancelled even if it came to an end in the very moment of the cancellation.

    The ``asyncio.wait_for`` of Python 3.11, which nats-py uses, then returns as if nothing had happened, and whoever cancelled
    a loop of requests waits for its end for ever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    result = await work
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def within(seconds: float, work: Awaitable[T]) -> T:
    """What ``work`` returns, if that takes no longer; else it is cancelled, again and again if it swallows that.

    nats-py tries to connect for ever, and what it uses for each try swallows a cancellation that comes together with a refusal
    (see :func:`heed_cancel`): cancelled once, it could go on, and nobody would ever hear of the time that is up.

    Raises:
        TimeoutError: it took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_AGAIN)
        if not task.cancelled():
            task.exception()  # or asyncio would complain that nobody asked


async def connect(
    url: str,
    *,
    name: str,
    token: str | None = None,
    on_reconnect: Callback | None = None,
    on_closed: Callback | None = None,
    on_error: ErrorCallback | None = None,
) -> Nats:
    """A connection that reconnects for ever; ``name`` shows in the server's connection list.

    ``on_error`` is called with what the connection runs into; without one, that is logged.
    ``on_closed`` is called when the client gives up for good all the same (the server answered with an error it does not
    recover from): whoever owns the connection must build a new one, or end.

    Raises:
        Unavailable: nothing answers at ``url``.
        NotAllowed: the credentials are refused.
    """
    client = _Client()
    try:
        connecting = client.connect(
            url,
            name=name,
            token=token,
            connect_timeout=2,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type]  # seconds; a float works
            ping_interval=10,
            max_outstanding_pings=2,
            drain_timeout=2,
            error_cb=on_error or _error_log(),
            reconnected_cb=on_reconnect,
            closed_cb=on_closed,
        )
        await within(_CONNECT_TIMEOUT, connecting)
    except nats.errors.AuthorizationError as error:
        raise NotAllowed(f"NATS at {url} refuses these credentials", hint="check HELMR_API_KEY") from error
    except (TimeoutError, OSError, nats.errors.Error) as error:
        await client.close()
        raise unreachable(url) from error
    except asyncio.CancelledError:
        await client.close()
        raise
    if not client.is_connected:  # connect() can return unconnected when the server hangs up during the handshake
        await client.close()
        raise unreachable(url)
    return client


def unreachable(url: str) -> Unavailable:
    """The error for a server that does not answer."""
    hint = "start Helmr with `helmr dev` (or `helmr server`), or set HELMR_URL to a server that runs"
    return Unavailable(f"no NATS server answers at {url}", hint=hint)


def endpoints(url: str) -> tuple[tuple[str, int], ...]:
    """Host and port of each server that a URL (or several, with commas) names."""
    found = [urlsplit(each.strip()) for each in url.split(",")]
    return tuple((each.hostname, each.port or _PORTS.get(each.scheme, 4222)) for each in found if each.hostname)


def server_version(client: Nats) -> str:
    """The version of the server the client is connected to, e.g. ``2.15.1``."""
    version = client.connected_server_version
    return f"{version.major}.{version.minor}.{version.patch}"


def _error_log() -> ErrorCallback:
    """Logs what a connection runs into, but the same thing only every now and then: it is tried ten times a second."""
    last = ("", -math.inf)

    async def note(error: Exception) -> None:
        nonlocal last
        text, now = f"{type(error).__name__}: {error}", time.monotonic()
        expected = ConnectionRefusedError | nats.errors.StaleConnectionError | nats.errors.UnexpectedEOF
        if isinstance(error, expected) or (text == last[0] and now - last[1] < _REPEAT_AFTER):
            log.debug("connection: %s", text)
        else:
            last = (text, now)
            log.warning("connection: %s", text)

    return note


@asynccontextmanager
async def connected(url: str, *, name: str, token: str | None = None) -> AsyncIterator[Nats]:
    """A connection for the length of a block."""
    client = await connect(url, name=name, token=token)
    try:
        yield client
    finally:
        await client.close()
