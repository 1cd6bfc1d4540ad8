"""Access tokens: secrets that let the outside world do one thing over HTTP; made, shown, listed and revoked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helmr import ids
from helmr.access import DEFAULT_LIFETIME, Access, NewAccess
from helmr.client.pages import newest
from helmr.client.wire import Wire
from helmr.durations import Duration, seconds
from helmr.models import Session, Token

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient


class AccessTokens:
    """``client.access``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def _wire(self) -> Wire:
        return self._client.wire

    async def for_input(
        self,
        session: str | Session,
        stream: str,
        *,
        correlation_id: str | None = None,
        uses: int | None = None,
        expires_in: Duration = DEFAULT_LIFETIME,
        note: str | None = None,
    ) -> NewAccess:
        """Let whoever has the answer's ``secret`` append to one input stream of a session. It is shown this once.

        Args:
            correlation_id: every record that is appended carries it, and no other.
            uses: how many records may be appended, 1 to 100; None: any number.
            expires_in: until when, at most 365 d.
            note: what it is for, or who has it, at most 200 characters.

        Raises:
            NotFound: no such session, or it declares no such stream.
            UsageError: a limit is exceeded.
        """
        target = {"session": await self._session(session), "stream": stream, "correlation_id": correlation_id}
        return await self._create("append", target, uses, expires_in, note)

    async def for_output(
        self,
        session: str | Session,
        stream: str,
        *,
        correlation_id: str | None = None,
        uses: int | None = None,
        expires_in: Duration = DEFAULT_LIFETIME,
        note: str | None = None,
    ) -> NewAccess:
        """Let whoever has the ``secret`` read one output stream, with a ``correlation_id`` only records that carry it.

        Each page, and each time that the stream is followed, is one of the ``uses``.
        """
        target = {"session": await self._session(session), "stream": stream, "correlation_id": correlation_id}
        return await self._create("read", target, uses, expires_in, note)

    async def for_token(
        self,
        token: str | Token,
        *,
        uses: int | None = None,
        expires_in: Duration = DEFAULT_LIFETIME,
        note: str | None = None,
    ) -> NewAccess:
        """Let whoever has the ``secret`` complete one token."""
        target = {"token": await self._client.resolve("token", token if isinstance(token, str) else token.id)}
        return await self._create("complete", target, uses, expires_in, note)

    async def get(self, access: str | Access) -> Access:
        """One access token, by id, unique prefix or ``@last``."""
        return await self._wire.call("access", "get", {"id": await self._id(access)}, Access)

    async def list(
        self, *, status: str | None = None, session: str | Session | None = None, limit: int = 50
    ) -> list[Access]:
        """Access tokens, newest first: with ``status="active"`` those that can still be used."""
        filters = {"status": status, "session": None if session is None else await self._session(session)}
        return await newest(self._wire, "access", filters, Access, limit)

    async def revoke(self, access: str | Access, *, reason: str | None = None) -> Access:
        """End an access token now; whoever follows a stream with it hears no more. One that has ended stays as it is."""
        body = {"id": await self._id(access), "reason": reason}
        return await self._wire.call("access", "revoke", body, Access)

    async def _id(self, access: str | Access) -> str:
        return await self._client.resolve("access", access if isinstance(access, str) else access.id)

    async def _session(self, session: str | Session) -> str:
        return await self._client.resolve("session", session if isinstance(session, str) else session.id)

    async def _create(
        self, action: str, target: dict[str, Any], uses: int | None, expires_in: Duration, note: str | None
    ) -> NewAccess:
        lifetime = seconds(expires_in, what="expires_in")
        body = {"request_id": ids.new("req"), "action": action, "uses": uses, "lifetime": lifetime, "note": note}
        return await self._wire.call("access", "create", body | target, NewAccess)
