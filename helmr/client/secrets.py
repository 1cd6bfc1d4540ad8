"""Secrets: set, list, get, delete, rotate. Values go in and never come out."""

from __future__ import annotations

import getpass
import socket
from typing import TYPE_CHECKING

import msgspec

from helmr.models import StoredSecret

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient

#: Seconds that encrypting everything anew may take.
_ROTATE_TIMEOUT = 300.0


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """The key that all secrets are encrypted with now, and how many were encrypted anew."""

    key_id: str
    reencrypted: int


class Secrets:
    """``client.secrets``"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def set(self, name: str, value: str) -> StoredSecret:
        """Store a value of up to 64 KiB under a name, in the place of the one before. Runs get it from their next start on.

        Raises:
            UsageError: the name or the value cannot be used.
            TooLarge: the value exceeds the limit.
        """
        body = {"name": name, "value": value, "by": _whoever()}
        return await self._client.wire.call("secret", "set", body, StoredSecret)

    async def get(self, name: str) -> StoredSecret:
        """What is known about a secret, which is not its value.

        Raises:
            NotFound: nothing is stored under this name.
        """
        return await self._client.wire.call("secret", "get", {"name": name}, StoredSecret)

    async def list(self) -> list[StoredSecret]:
        """What is known about all secrets of the environment, by name."""
        return await self._client.wire.call("secret", "list", {}, list[StoredSecret])

    async def delete(self, name: str) -> StoredSecret:
        """Remove a secret; runs that execute keep the value they were given.

        Raises:
            NotFound: nothing is stored under this name.
        """
        return await self._client.wire.call("secret", "delete", {"name": name}, StoredSecret)

    async def rotate(self) -> Rotated:
        """Encrypt the secrets of every environment with a new key; repeat it if it was interrupted."""
        return await self._client.wire.call("secret", "rotate", {}, Rotated, timeout=_ROTATE_TIMEOUT)


def _whoever() -> str:
    """``user@host``, for the record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as containers have them
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
