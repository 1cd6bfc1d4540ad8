"""The HTTP endpoint for the outside world: completing tokens, and nothing else. Fit to be exposed, so it says little.

Whoever calls has a secret or has nothing: an unknown token and a wrong secret get the same answer. Nothing can be listed.
Requests are bounded in size, time and number. Needs the optional packages ``starlette`` and ``uvicorn``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from bus import tokens
from bus.exposition import Address
from bus.log import Log
from bus.services.tokens import MAX_DATA
from helmr.errors import ConfigError, Conflict, HelmrError, NotFound
from helmr.events import TokenState

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

#: Requests of one address: so many at once, and so many a second after that.
BURST, RATE = 60.0, 20.0
#: Addresses remembered; the one that was quiet for longest is forgotten.
_ADDRESSES = 10_000
#: Seconds in which a body must have arrived.
_BODY_TIME = 10.0
#: Bytes of a body that are read at most, only to be able to say that it is too large.
_DROPPED = 16 * 1024 * 1024
#: Requests at the same time, whoever they are from.
_CONCURRENT = 128
_SECRET_LENGTH = 256


class Refused(Exception):
    """The request ends with this status; there is nothing more to be said."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class RateLimit:
    """A bucket of requests for each address."""

    def __init__(self, now: Callable[[], float], *, burst: float = BURST, rate: float = RATE) -> None:
        self._now = now
        self._burst = burst
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> bool:
        """Whether one more request is fine."""
        now = self._now()
        left, at = self._buckets.pop(address, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        allowed = left >= 1
        self._buckets[address] = (left - allowed, now)
        if len(self._buckets) > _ADDRESSES:
            self._buckets.popitem(last=False)
        return allowed


class Gateway:
    """What the endpoint does with a request."""

    def __init__(self, log_: Log, now: Callable[[], float]) -> None:
        self._log = log_
        self._limit = RateLimit(now)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/tokens/{id}/complete`` with ``Authorization: Bearer <secret>``; the body is the data."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else ""
        return await self._answer(request, request.path_params["token"], given)

    async def callback(self, request: Request) -> Response:
        """``POST /v1/callbacks/{secret}``; the body is the data."""
        secret = request.path_params["secret"]
        return await self._answer(request, secret.partition(".")[0], secret)

    async def _answer(self, request: Request, token_id: str, secret: str) -> Response:
        from starlette.responses import JSONResponse

        try:
            self._admit(request)
            data = await _body(request)
            await self._complete(token_id, secret, data)
        except Refused as refused:
            return JSONResponse({"error": refused.error}, refused.status)
        except Exception:
            log.exception("a request to complete a token failed")
            return JSONResponse({"error": "failure"}, 500)
        return JSONResponse({"status": "completed"})

    def _admit(self, request: Request) -> None:
        if not self._limit.take(request.client.host if request.client else ""):
            raise Refused(429, "too_many_requests")

    async def _complete(self, token_id: str, secret: str, data: Any) -> None:
        try:
            found = await tokens.find(self._log, token_id)
            state = found[1].state if found is not None else None
            if not _allowed(state, secret) or found is None:
                raise Refused(401, "unauthorized")
            await tokens.complete(self._log, found[0], token_id, data)
        except NotFound:
            raise Refused(401, "unauthorized") from None
        except Conflict as conflict:
            status = conflict.details.get("status", "completed")
            raise Refused(410 if status == "expired" else 409, status) from None
        except HelmrError as error:
            log.warning("a token could not be completed: %s", error)
            raise Refused(503, "unavailable") from None


def _allowed(state: TokenState | None, secret: str) -> bool:
    """Whether the secret is one of the token's; for a token that does not exist it takes the same time to say no."""
    if len(secret) > _SECRET_LENGTH:
        return False
    if state is None:
        return tokens.fits(_NOBODY, secret)
    return tokens.fits(state, secret)


async def _body(request: Request) -> Any:
    """The JSON of a request; an empty body is null.

    Raises:
        Refused: it is too large, comes too slowly, or is no JSON.
    """
    try:
        async with asyncio.timeout(_BODY_TIME):
            text = await _read(request)
    except TimeoutError:
        raise Refused(408, "too_slow") from None
    try:
        return msgspec.json.decode(text) if text else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Refused(400, "not_json") from None


async def _read(request: Request) -> bytes:
    """The body. Of one that is too large the rest is read and dropped: a client that still sends does not hear the answer."""
    text, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_DATA:
            text += part
        elif size > _DROPPED:
            break
    if size > MAX_DATA:
        raise Refused(413, "too_large")
    return bytes(text)


_NOBODY = msgspec.convert(
    {
        "id": "tok_nobody",
        "status": "pending",
        "cursor": 1,
        "secrets": ["0" * 64],
        "expires_at": "2000-01-01T00:00:00Z",
        "created_at": "2000-01-01T00:00:00Z",
    },
    TokenState,
)


@asynccontextmanager
async def serving(address: Address, log_: Log) -> AsyncIterator[str]:
    """Answer at ``address`` for the length of a block; the URL.

    Raises:
        ConfigError: the packages are not installed, or the address cannot be listened on.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError("the HTTP endpoint needs starlette and uvicorn", hint="pip install 'helmr[http]'") from error

    class Server(uvicorn.Server):
        """One that leaves signals to the program it is a part of."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set()

    ready = asyncio.Event()
    gateway = Gateway(log_, asyncio.get_running_loop().time)
    routes = [
        Route("/v1/tokens/{token}/complete", gateway.complete, methods=["POST"]),
        Route("/v1/callbacks/{secret}", gateway.callback, methods=["POST"]),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes),
        host=address.host,
        port=address.port,
        access_log=False,  # the path of a callback is a secret
        log_config=None,
        server_header=False,
        lifespan="off",
        limit_concurrency=_CONCURRENT,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    server = Server(config)
    try:
        listening = config.bind_socket()
    except (OSError, SystemExit) as error:
        hint = "choose another port, or the address of this machine"
        raise ConfigError(f"cannot listen on {address.host}:{address.port}", hint=hint) from error
    host, port = listening.getsockname()[:2]
    serving_ = asyncio.create_task(server.serve([listening]))
    try:
        await ready.wait()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving_
        listening.close()
