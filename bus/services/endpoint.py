"""How a request becomes a call: subjects, decoding, errors and deadlines, the same for every service.

A reply is JSON. An error reply carries ``Nats-Service-Error`` and ``Nats-Service-Error-Code`` headers, as nats.micro does, and
``{"error": {code, message, hint, details}}`` as its body.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
import nats.errors
from nats.aio.client import Client as Nats
from nats.micro import add_service
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service

from helmr import subjects
from helmr.errors import HelmrError, Unavailable, UsageError
from helmr.subjects import Scope

log = logging.getLogger(__name__)

#: Requests of one process that are worked on at the same time; more wait in the server's queue.
_MAX_CONCURRENT = 256

Handler = Callable[[Scope, Any], Awaitable[Any]]


class Endpoint(NamedTuple):
    """One verb of one noun: ``handler(scope, request)`` gets the decoded request and returns the record to reply."""

    noun: str
    verb: str
    request: type[Any]
    handler: Handler


class Tally:
    """How often each verb was answered, and with which code: ``ok``, or that of the error."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, ...]] = Counter()

    def note(self, endpoint: Endpoint, code: str) -> None:
        """Count an answer."""
        self.answers[endpoint.noun, endpoint.verb, code] += 1


async def serve(
    nc: Nats,
    name: str,
    version: str,
    endpoints: list[Endpoint],
    tasks: asyncio.TaskGroup,
    *,
    tally: Tally | None = None,
) -> Service:
    """Answer ``endpoints`` for every scope, sharing the load with other processes that serve the same name."""
    counted = tally or Tally()
    service = await add_service(nc, name=name, version=version, description="Helmr")
    limit = asyncio.Semaphore(_MAX_CONCURRENT)
    for endpoint in endpoints:
        config = EndpointConfig(
            name=f"{endpoint.noun}-{endpoint.verb}",
            subject=subjects.api_endpoint(endpoint.noun, endpoint.verb),
            handler=_spawner(endpoint, tasks, limit, counted),
            queue_group=name,
        )
        await service.add_endpoint(config)
    return service


def _spawner(
    endpoint: Endpoint, tasks: asyncio.TaskGroup, limit: asyncio.Semaphore, tally: Tally
) -> Callable[[Request], Awaitable[None]]:
    """nats-py calls handlers one after the other: each request gets a task of its own, so that a slow one blocks nobody."""

    async def spawn(request: Request) -> None:
        await limit.acquire()
        task = tasks.create_task(_answer(endpoint, request, tally))
        task.add_done_callback(lambda _: limit.release())

    return spawn


async def _answer(endpoint: Endpoint, request: Request, tally: Tally) -> None:
    try:
        scope, _, _ = subjects.parse_api(request.subject)
        reply = msgspec.json.encode(await endpoint.handler(scope, _body(endpoint, request)))
    except HelmrError as error:
        tally.note(endpoint, error.code)
        await _refuse(request, error)
    except (nats.errors.Error, TimeoutError) as error:
        tally.note(endpoint, Unavailable.code)
        await _refuse(request, Unavailable(f"NATS does not answer: {type(error).__name__} {error}"))
    except Exception:
        tally.note(endpoint, "failure")
        log.exception("%s %s", endpoint.noun, endpoint.verb)
        await _refuse(
            request, HelmrError("Helmr's control failed", hint="its log says more: see `helmr server`'s stderr")
        )
    else:
        tally.note(endpoint, "ok")
        await _reply(request, reply, None)


def _body(endpoint: Endpoint, request: Request) -> Any:
    try:
        return msgspec.json.decode(request.data or b"{}", type=endpoint.request)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"bad {endpoint.noun} {endpoint.verb} request: {error}") from error


async def _refuse(request: Request, error: HelmrError) -> None:
    headers = {"Nats-Service-Error": error.code, "Nats-Service-Error-Code": "400"}
    await _reply(request, msgspec.json.encode({"error": error.to_dict()}), headers)


async def _reply(request: Request, body: bytes, headers: dict[str, str] | None) -> None:
    try:
        await request.respond(body, headers=headers)
    except nats.errors.MaxPayloadError:
        error = HelmrError(
            f"the answer is {len(body)} bytes, more than NATS lets through", hint="ask for less at a time"
        )
        await _refuse(request, error)
    except nats.errors.Error as error:
        log.warning("a reply was lost: %s", error)
