"""Requests and replies over NATS, with every transport error translated into Helmr's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from helmr import connection, errors, subjects
from helmr.errors import HelmrError, TimedOut, Unavailable
from helmr.subjects import Scope

T = TypeVar("T")

#: Seconds a request may take unless its caller says otherwise.
TIMEOUT = 10.0
_RETRY_DELAY = 0.2
#: Seconds a follower puts up with a part of Helmr being away.
PATIENCE = 30.0
_END, _PART = "Helmr-End", "Helmr-Part"


class Wire:
    """One connection, bound to a project and environment."""

    def __init__(self, nc: Nats, scope: Scope) -> None:
        self.nc = nc
        self.scope = scope

    @classmethod
    async def connect(cls, url: str, scope: Scope, *, token: str | None) -> Wire:
        """Connect.

        Raises:
            Unavailable: nothing answers at ``url``.
            NotAllowed: the credentials are refused.
        """
        nc = await connection.connect(url, name="helmr-client", token=token, on_error=_ignore)
        return cls(nc, scope)

    @property
    def reconnects(self) -> int:
        """How many times the connection was lost and came back: live messages may have been missed then."""
        return self.nc.stats["reconnects"]

    async def close(self) -> None:
        """Close the connection; what could not be sent because the server is away is dropped."""
        try:
            await self.nc.close()
        except (OSError, nats.errors.Error):  # away: there is nobody to say good-bye to
            return

    async def call(
        self,
        noun: str,
        verb: str,
        body: Any,
        reply: type[T],
        *,
        timeout: float = TIMEOUT,  # noqa: ASYNC109
        patience: float = 0.0,
    ) -> T:
        """Send a request and decode its reply; while Helmr is being restarted, again for ``patience`` seconds.

        Raises:
            HelmrError: what the service answered.
            Unavailable: nobody serves this, or the connection is lost.
            TimedOut: no answer in ``timeout`` seconds; the request may have taken effect all the same.
        """
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            try:
                return self._decode(await self._request(noun, verb, body, timeout), reply)
            except (Unavailable, TimedOut):
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(_RETRY_DELAY)  # nothing tells a client that a service is back

    async def _request(self, noun: str, verb: str, body: Any, timeout: float) -> Msg:  # noqa: ASYNC109
        subject = subjects.api(self.scope, noun, verb)
        try:
            return await self.nc.request(subject, msgspec.json.encode(body), timeout=timeout)
        except nats.errors.NoRespondersError as error:
            raise _nobody(noun) from error
        except TimeoutError as error:
            raise TimedOut(f"no answer to {noun} {verb} in {timeout:g} s", hint="see `helmr status`") from error
        except nats.errors.MaxPayloadError as error:
            raise errors.TooLarge("the request exceeds what NATS lets through") from error
        except (nats.errors.Error, OSError) as error:
            raise Unavailable(f"the connection to NATS was lost: {error}", hint="see `helmr status`") from error

    def _decode(self, msg: Msg, reply: type[T]) -> T:
        raise_error(msg)
        try:
            return msgspec.json.decode(msg.data, type=reply)
        except msgspec.ValidationError as error:
            message = f"the server's answer is not understood: {error}"
            raise HelmrError(message, hint="client and server may be of different versions") from error

    async def parts(
        self,
        noun: str,
        verb: str,
        body: Any,
        *,
        timeout: float,  # noqa: ASYNC109
        on_end: Callable[[dict[str, str]], None] = lambda _: None,
    ) -> AsyncIterator[bytes]:
        """Send a request whose reply comes in several messages.

        ``timeout`` is for each of them; ``on_end`` gets the headers of the last one.
        """
        inbox = self.nc.new_inbox()
        queue: asyncio.Queue[Msg] = asyncio.Queue()
        subscription = await self.nc.subscribe(inbox, cb=queue.put)
        try:
            await self.nc.publish(subjects.api(self.scope, noun, verb), msgspec.json.encode(body), reply=inbox)
            expected = 0
            while True:
                try:
                    async with asyncio.timeout(timeout):
                        msg = await queue.get()
                except TimeoutError as error:
                    raise TimedOut(f"no answer to {noun} {verb} in {timeout:g} s", hint="see `helmr status`") from error
                headers = msg.headers or {}
                if headers.get("Status") == "503":
                    raise _nobody(noun)
                raise_error(msg)
                if int(headers.get(_PART, expected)) != expected:
                    raise Unavailable("a part of the answer was lost", hint="try again")
                expected += 1
                if msg.data:
                    yield msg.data
                if _END in headers or _PART not in headers:
                    on_end(headers)
                    return
        finally:
            await _unsubscribe(subscription)

    @asynccontextmanager
    async def subscribe(self, subject: str, callback: Callable[[Msg], Any]) -> AsyncIterator[None]:
        """Have ``callback`` called for every live message while a block runs."""

        async def deliver(msg: Msg) -> None:
            callback(msg)

        subscription = await self.nc.subscribe(subject, cb=deliver)
        try:
            await self.nc.flush(timeout=5)
            yield
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the connection to NATS was lost: {error}") from error
        finally:
            await _unsubscribe(subscription)


def raise_error(msg: Msg) -> None:
    """Raise the error that a reply describes, if it is one."""
    if msg.headers and "Nats-Service-Error" in msg.headers:
        try:
            described = msgspec.json.decode(msg.data)["error"]
        except (msgspec.DecodeError, KeyError, TypeError):
            described = {"message": msg.headers["Nats-Service-Error"]}
        raise errors.from_dict(described)


def _nobody(noun: str) -> Unavailable:
    part = "projector" if noun == "history" else "control"
    return Unavailable(
        f"Helmr's {part} does not answer", hint="see `helmr status`; `helmr dev` and `helmr server` run it"
    )


async def _unsubscribe(subscription: Subscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error:
        return  # the connection is closed: nothing is left to undo


async def _ignore(_error: Exception) -> None:
    """The client reconnects by itself; what matters reaches the caller through the call that failed."""
