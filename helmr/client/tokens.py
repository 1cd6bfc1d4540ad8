"""Tokens: create, get, list, complete, cancel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from helmr import ids, jsonform
from helmr.client.pages import newest
from helmr.client.wire import Wire
from helmr.durations import Duration, seconds
from helmr.errors import UsageError
from helmr.jsonform import ConversionError
from helmr.models import NewToken, Token
from helmr.tokens import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient


class Tokens:
    """``client.tokens``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def _wire(self) -> Wire:
        return self._client.wire

    async def create(
        self,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,  # noqa: ASYNC109  it is the token's
        tags: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> NewToken:
        """Make a token that no run made; a task waits for it with ``tokens.get(id).wait()``.

        The answer has a ``secret``, which completes this token over HTTP; it is shown this once and stored as a hash.

        Raises:
            UsageError, TooLarge: a limit is exceeded.
        """
        body = {
            "request_id": ids.new("req"),
            "timeout": seconds(timeout, what="timeout"),
            "tags": list(tags),
            "metadata": dict(metadata or {}),
        }
        return await self._wire.call("token", "create", body, NewToken)

    async def get(self, token: str | Token) -> Token:
        """One token, by id, unique prefix or ``@last``."""
        return await self._wire.call("token", "get", {"id": await self._id(token)}, Token)

    async def list(
        self,
        *,
        status: str | None = None,
        tag: str | None = None,
        run: str | None = None,
        session: str | None = None,
        limit: int = 50,
    ) -> list[Token]:
        """Tokens, newest first, without the data they were completed with; perhaps only those a run or session made."""
        filters = {
            "status": status,
            "tag": tag,
            "run": None if run is None else await self._client.resolve("run", run),
            "session": None if session is None else await self._client.resolve("session", session),
        }
        return await newest(self._wire, "tokens", filters, Token, limit)

    async def complete(self, token: str | Token, data: Any = None) -> Token:
        """Complete a token; the same data again changes nothing.

        Raises:
            Conflict: it is completed with other data, cancelled or expired; ``details["status"]`` says which.
        """
        try:
            value = jsonform.to_builtins(data)
        except ConversionError as error:
            raise UsageError(f"the data cannot be written as JSON: {error}") from error
        return await self._wire.call("token", "complete", {"id": await self._id(token), "data": value}, Token)

    async def cancel(self, token: str | Token, *, reason: str | None = None) -> Token:
        """Cancel a token; a run that waits for it hears of it."""
        return await self._wire.call("token", "cancel", {"id": await self._id(token), "reason": reason}, Token)

    async def _id(self, token: str | Token) -> str:
        return await self._client.resolve("token", token if isinstance(token, str) else token.id)
