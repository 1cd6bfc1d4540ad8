"""Storing secrets, and handing their values to the one worker that needs them.

Nothing here answers with a value but ``secret release``, and that only to a request that shows the lease of a run which
declares the secret.
"""

from __future__ import annotations

import msgspec

from bus.leases import spec_of
from bus.log import RUN, Log
from bus.services.endpoint import Endpoint
from bus.vault import Vault, hint_to_set
from helmr.declarations import NAME
from helmr.errors import Conflict, NotFound, TooLarge, UsageError
from helmr.models import StoredSecret
from helmr.reducers import run as rules
from helmr.subjects import Scope

#: Bytes of one value, in UTF-8: the kernel takes 128 KiB for one environment variable, name included.
MAX_VALUE = 64 * 1024
_MAX_BY = 256


class SetRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Store a value; ``by`` is who does, as far as the client knows."""

    name: str
    value: str
    by: str | None = None

    def __repr__(self) -> str:
        return f"SetRequest({self.name!r})"


class SecretRef(msgspec.Struct, kw_only=True):
    """A secret by name."""

    name: str


class AllSecrets(msgspec.Struct):
    """A request about every secret of an environment, or of all."""


class RotateReply(msgspec.Struct, kw_only=True):
    """The key that everything is encrypted with now, and how many values were encrypted anew."""

    key_id: str
    reencrypted: int


class ReleaseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A worker's request for the values of one run, with the lease it holds."""

    run_id: str
    worker: str
    lease: int


class ReleaseReply(msgspec.Struct, kw_only=True):
    """The values by name."""

    values: dict[str, str]

    def __repr__(self) -> str:
        return f"ReleaseReply({sorted(self.values)})"


class Secrets:
    """The secret service."""

    def __init__(self, log: Log, vault: Vault) -> None:
        self.log = log
        self.vault = vault

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("secret", "set", SetRequest, self.set),
            Endpoint("secret", "get", SecretRef, self.get),
            Endpoint("secret", "list", AllSecrets, self.list),
            Endpoint("secret", "delete", SecretRef, self.delete),
            Endpoint("secret", "rotate", AllSecrets, self.rotate),
            Endpoint("secret", "release", ReleaseRequest, self.release),
        ]

    async def set(self, scope: Scope, request: SetRequest) -> StoredSecret:
        """Store a value.

        Raises:
            UsageError, TooLarge: it, or its name, cannot be used.
        """
        check_value(request.value)
        by = request.by[:_MAX_BY] if request.by else None
        return await self.vault.set(scope, _checked(request.name), request.value, by=by)

    async def get(self, scope: Scope, request: SecretRef) -> StoredSecret:
        """What is known about one secret."""
        return await self.vault.get(scope, _checked(request.name))

    async def list(self, scope: Scope, _request: AllSecrets) -> list[StoredSecret]:
        """What is known about all secrets of the environment."""
        return await self.vault.all(scope)

    async def delete(self, scope: Scope, request: SecretRef) -> StoredSecret:
        """Remove one secret."""
        return await self.vault.delete(scope, _checked(request.name))

    async def rotate(self, _scope: Scope, _request: AllSecrets) -> RotateReply:
        """Encrypt everything, in every environment, with a new key."""
        key, count = await self.vault.rotate()
        return RotateReply(key_id=key.id, reencrypted=count)

    async def release(self, scope: Scope, request: ReleaseRequest) -> ReleaseReply:
        """The values of the secrets that a run declares, for whoever holds its lease.

        Raises:
            Conflict: the lease is not, or no longer, this worker's.
            NotFound: a secret has been deleted since the run was started (``details["missing"]``).
        """
        run = await self.log.present(RUN, scope, request.run_id)
        if not rules.holds(run.state, worker=request.worker, cursor=request.lease):
            raise Conflict(f"run {request.run_id} is not leased to {request.worker}")
        names = spec_of(await self.log.first(RUN, scope, request.run_id)).secrets
        values = await self.vault.values(scope, names)
        missing = [name for name in names if name not in values]
        if missing:
            raise NotFound(
                f"the secret {missing[0]} is not set any more",
                hint=hint_to_set(missing[0]),
                details={"missing": missing},
            )
        return ReleaseReply(values=values)


def check_value(value: str) -> None:
    """Refuse what no environment variable can hold.

    Raises:
        UsageError, TooLarge: with what to do instead.
    """
    if not value:
        raise UsageError("the value is empty", hint="write it to the standard input of `helmr secret set`")
    if "\0" in value:
        raise UsageError("the value has a zero byte in it", hint="encode it, e.g. with `base64`")
    size = len(value.encode())
    if size > MAX_VALUE:
        raise TooLarge(f"the value is {size} bytes; the limit is {MAX_VALUE}")


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a secret name",
            hint="use 1 to 128 letters, digits, - and _, beginning with a letter or digit",
        )
    return name
