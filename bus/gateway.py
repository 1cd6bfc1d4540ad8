"""The HTTP endpoint for the outside world: what tokens and access tokens allow, and no more. Fit to be exposed: it says little.

Whoever calls has a secret or has nothing: unknown, expired, used up or for something else is the same answer. Nothing can be
listed. Requests are bounded in size, time and number. Needs the optional packages ``starlette`` and ``uvicorn``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from bus import access, capabilities, tokens
from bus.exposition import Address
from bus.http_request import Refused, bearer, body, number
from bus.log import TOKEN, Log
from bus.rate_limit import RateLimit
from bus.services.streams import ListRequest, SendRequest, Streams
from helmr import events, ids
from helmr.access import AccessState, Action
from helmr.errors import ConfigError, Conflict, HelmrError, NotAllowed, NotFound, PayloadInvalid, TooLarge, UsageError
from helmr.reducers import access as access_rules
from helmr.reducers import token as token_rules
from helmr.subjects import Scope

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

log = logging.getLogger(__name__)

#: Requests at the same time, whoever they are from; those who follow a stream come on top.
_CONCURRENT = 128
#: Records of a page, at most.
_PAGE = 500
#: The largest number that a record could have.
_LAST = 2**53
_EVENT_STREAM = "text/event-stream"
#: What scripts of other origins may send along: the secret is all that counts, and no browser adds that by itself.
_HEADERS = ["Authorization", "Content-Type", "Idempotency-Key", "Correlation-Id", "Last-Event-ID"]

Handler = Callable[["Request"], Awaitable["Response | dict[str, Any]"]]


class Holder(NamedTuple):
    """What the secret of a request allows, and where."""

    scope: Scope
    state: AccessState


class Gateway:
    """What the endpoint does with a request."""

    def __init__(self, log_: Log, streams: Streams, now: Callable[[], float]) -> None:
        from bus.followers import Followers

        self._log = log_
        self._streams = streams
        self._addresses = RateLimit(now)
        self._holders = RateLimit(now)
        self._followers = Followers(log_)

    def routes(self) -> list[Route]:
        """What is answered, and how."""
        from starlette.routing import Route

        made = [
            Route("/v1/tokens/{token}/complete", self._answering(self._complete), methods=["POST"]),
            Route("/v1/callbacks/{secret}", self._answering(self._callback), methods=["POST"]),
            Route("/v1/sessions/{session}/input/{stream}", self._answering(self._append), methods=["POST"]),
            Route("/v1/sessions/{session}/output/{stream}", self._answering(self._read), methods=["GET"]),
        ]
        for route in made:
            (route.methods or set()).discard("HEAD")  # which would be a use, and for nothing
        return made

    def close(self) -> None:
        """Let those go who follow a stream."""
        self._followers.close()

    def _answering(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """The handler, with its refusals and errors made into answers."""
        from starlette.responses import JSONResponse, Response

        async def answer(request: Request) -> Response:
            try:
                self._admit(request)
                told = await _translated(handler(request))
            except Refused as refused:
                told = JSONResponse(refused.body, refused.status)
            except Exception:
                log.exception("a request over HTTP failed")
                told = JSONResponse({"error": "failure"}, 500)
            if isinstance(told, Response):
                return told
            return Response(msgspec.json.encode(told), media_type="application/json", headers=_NOT_KEPT)

        return answer

    def _admit(self, request: Request) -> None:
        if not self._addresses.take(request.client.host if request.client else ""):
            raise Refused(429, "too_many_requests")

    # Tokens -------------------------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> dict[str, Any]:
        """Complete a token with one of its own secrets, or with an access token for it; the body is the data."""
        token_id, secret = request.path_params["token"], bearer(request)
        data = await body(request)
        if secret.startswith("acc_"):
            return await self._complete_with_access(request, token_id, data)
        return await self._complete_with_secret(token_id, secret, data)

    async def _callback(self, request: Request) -> dict[str, Any]:
        """Complete a token with the secret that is the path."""
        secret = request.path_params["secret"]
        return await self._complete_with_secret(capabilities.named(secret), secret, await body(request))

    async def _complete_with_secret(self, token_id: str, secret: str, data: Any) -> dict[str, Any]:
        found = await self._log.find(TOKEN, "tok", token_id)
        if not capabilities.fits(secret, () if found is None else found[1].state.secrets) or found is None:
            raise NotAllowed("no such token, or not its secret")
        await tokens.complete(self._log, found[0], token_id, data)
        return _COMPLETED

    async def _complete_with_access(self, request: Request, token_id: str, data: Any) -> dict[str, Any]:
        mark = token_rules.digest(data)
        holder = await self._holder(request, "complete", mark)
        if holder.state.token_id != token_id:
            raise NotAllowed("the access token is for another token")
        token = await self._log.present(TOKEN, holder.scope, token_id)
        if token_rules.complete(token.state, data, at=events.now()) is not None:
            await access.use(self._log, holder.scope, holder.state.id, key=mark)
            await tokens.complete(self._log, holder.scope, token_id, data)
        return _COMPLETED

    # Streams ------------------------------------------------------------------------------------------------------

    async def _append(self, request: Request) -> dict[str, Any]:
        """Append the body to an input stream."""
        data = await body(request)
        given = request.headers.get("idempotency-key")
        mark = given or ids.new("req")
        holder = await self._holder(request, "append", mark)
        _of_stream(request, holder.state)
        correlation_id = request.headers.get("correlation-id") or holder.state.correlation_id
        if holder.state.correlation_id not in (None, correlation_id):
            raise NotAllowed("the access token is for another correlation id")
        wanted = SendRequest(
            session=request.path_params["session"],
            stream=request.path_params["stream"],
            data=data,
            correlation_id=correlation_id,
            # Keys of its own: nobody outside may find out, or take away, those of others.
            idempotency_key=f"{holder.state.id} {given}" if given else None,
        )
        draft = await self._streams.draft(holder.scope, wanted)
        await access.use(self._log, holder.scope, holder.state.id, key=mark)
        made = msgspec.structs.replace(draft, access_id=holder.state.id)
        stored = await self._streams.store(holder.scope, made, wanted)
        return {"id": stored.id, "sequence": stored.sequence}

    async def _read(self, request: Request) -> Response | dict[str, Any]:
        """A page of an output stream, or, for who accepts an event stream, what is there and what comes."""
        mark = ids.new("req")
        holder = await self._holder(request, "read", mark)
        _of_stream(request, holder.state)
        after = number(request, "after", 0, _LAST)
        if _EVENT_STREAM in request.headers.get("accept", ""):
            return await self._follow(request, holder, mark, after)
        limit = number(request, "limit", _PAGE, _PAGE)
        await access.use(self._log, holder.scope, holder.state.id, key=mark)
        return await self._page(holder, after, limit)

    async def _page(self, holder: Holder, after: int, limit: int) -> dict[str, Any]:
        from bus.followers import public

        wanted = ListRequest(
            session=holder.state.session_id or "",
            stream=holder.state.stream or "",
            after=after,
            limit=limit,
            correlation_id=holder.state.correlation_id,
        )
        page = await self._streams.list_output(holder.scope, wanted)
        return {"records": [public(each) for each in page.records], "end": page.end, "more": page.more}

    async def _follow(self, request: Request, holder: Holder, mark: str, after: int) -> Response:
        from bus.followers import EventStream

        last = request.headers.get("last-event-id", "")
        if self._followers.full(holder.state.id):
            raise Refused(429, "too_many_requests")
        await access.use(self._log, holder.scope, holder.state.id, key=mark)
        seen = max(after, min(int(last), _LAST)) if last.isascii() and last.isdigit() and len(last) <= 18 else after
        return EventStream(self._followers.follow(holder.scope, holder.state, seen))

    async def _holder(self, request: Request, action: Action, mark: str) -> Holder:
        """What the bearer may do, if that is ``action`` and he may do it (again).

        Raises:
            NotAllowed: it is not; the answer must not tell why.
            Refused: too many requests with this secret.
        """
        found = await access.of_secret(self._log, bearer(request))
        if found is None or found[1].state.action != action:
            raise NotAllowed("no access token for this")
        state = found[1].state
        access_rules.use(state, key=access_rules.key_of(mark), at=events.now())
        if not self._holders.take(state.id):
            raise Refused(429, "too_many_requests")
        return Holder(found[0], state)


_COMPLETED = {"status": "completed"}
_NOT_KEPT = {"Cache-Control": "no-store"}


async def _translated(work: Awaitable[Response | dict[str, Any]]) -> Response | dict[str, Any]:
    """What the work results in; its errors as refusals that say no more than they must.

    Raises:
        Refused: the request ends here.
    """
    try:
        return await work
    except (NotFound, NotAllowed):
        raise Refused(401, "unauthorized") from None
    except Conflict as conflict:
        status = conflict.details.get("status", "conflict")
        raise Refused(410 if status == "expired" else 409, status) from None
    except PayloadInvalid as error:
        raise Refused(422, "invalid", path=str(error.details.get("path", "$"))) from None
    except TooLarge:
        raise Refused(413, "too_large") from None
    except UsageError:
        raise Refused(400, "bad_request") from None
    except HelmrError as error:
        log.warning("a request over HTTP could not be answered: %s", error)
        raise Refused(503, "unavailable") from None


def _of_stream(request: Request, state: AccessState) -> None:
    """Check that the path is what the access token is for.

    Raises:
        NotAllowed: it is not.
    """
    if (request.path_params["session"], request.path_params["stream"]) != (state.session_id, state.stream):
        raise NotAllowed("the access token is for another stream")


@asynccontextmanager
async def serving(address: Address, log_: Log, streams: Streams) -> AsyncIterator[str]:
    """Answer at ``address`` for the length of a block; the URL.

    Raises:
        ConfigError: the packages are not installed, or the address cannot be listened on.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware

        from bus.followers import FOLLOWERS
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
    gateway = Gateway(log_, streams, asyncio.get_running_loop().time)
    origins = Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=_HEADERS)
    config = uvicorn.Config(
        Starlette(routes=gateway.routes(), middleware=[origins]),
        host=address.host,
        port=address.port,
        access_log=False,  # the path of a callback is a secret
        log_config=None,
        server_header=False,
        lifespan="off",
        limit_concurrency=_CONCURRENT + FOLLOWERS,
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
        gateway.close()
        server.should_exit = True
        await serving_
        listening.close()
