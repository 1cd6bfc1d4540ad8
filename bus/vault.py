"""Secrets at rest: encrypted values in a bucket, each bound to its scope, name, version and key.

AES-256-GCM with a random nonce of 96 bits for each value. What a value is bound to is authenticated with it, so that the
value of one secret cannot be passed off as another's by whoever can write to the bucket. Whoever can read it learns names,
times and sizes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import datetime

import msgspec
import nats.errors
import nats.js.errors
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nats.aio.client import Client as Nats
from nats.js.kv import KeyValue

from bus import topology
from bus.keyring import Key, KeyRing
from bus.requests import api
from helmr import events
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable
from helmr.models import StoredSecret
from helmr.subjects import Scope

_NONCE_BYTES = 12
#: Tries of one change: each failure means that somebody else has just changed the same secret.
_TRIES = 20


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """A secret as it is stored."""

    name: str
    version: int
    key_id: str
    nonce: bytes
    ciphertext: bytes
    created_at: datetime
    updated_at: datetime
    updated_by: str | None = None


def seal(scope: Scope, key: Key, value: str, facts: Sealed) -> Sealed:
    """``facts`` with the value, encrypted with ``key``."""
    facts = msgspec.structs.replace(facts, key_id=key.id, nonce=os.urandom(_NONCE_BYTES))
    ciphertext = AESGCM(key.raw).encrypt(facts.nonce, value.encode(), _bound_to(scope, facts))
    return msgspec.structs.replace(facts, ciphertext=ciphertext)


def unseal(scope: Scope, key: Key, sealed: Sealed) -> str:
    """The value.

    Raises:
        HelmrError: it was tampered with, or belongs elsewhere.
    """
    try:
        return AESGCM(key.raw).decrypt(sealed.nonce, sealed.ciphertext, _bound_to(scope, sealed)).decode()
    except InvalidTag as error:
        raise HelmrError(
            f"secret {sealed.name} cannot be decrypted: it was tampered with", hint="store it again: helmr secret set"
        ) from error


def _bound_to(scope: Scope, sealed: Sealed) -> bytes:
    return msgspec.json.encode([*scope, sealed.name, sealed.version, sealed.key_id])


class Vault:
    """The secrets of every project and environment, in the bucket ``secrets``."""

    def __init__(self, nc: Nats, ring: KeyRing) -> None:
        self.nc = nc
        self.ring = ring
        #: Nothing is encrypted with a key that a rotation is about to forget.
        self._lock = asyncio.Lock()

    async def set(self, scope: Scope, name: str, value: str, *, by: str | None) -> StoredSecret:
        """Store a value under a name, in the place of the one before.

        Raises:
            HelmrError: the key of the secrets that are stored already is not here.
        """
        async with self._lock:
            return await self._set(scope, name, value, by, await self._current_key())

    async def _set(self, scope: Scope, name: str, value: str, by: str | None, key: Key) -> StoredSecret:
        for _ in range(_TRIES):
            found = await self._read(scope, name)
            at = events.now()
            facts = Sealed(
                name=name,
                version=found[1].version + 1 if found else 1,
                key_id=key.id,
                nonce=b"",
                ciphertext=b"",
                created_at=found[1].created_at if found else at,
                updated_at=at,
                updated_by=by,
            )
            sealed = seal(scope, key, value, facts)
            if await self._write(scope, sealed, found[0] if found else None):
                return _record(scope, sealed)
        raise Conflict(f"secret {name} is being changed by others all the time", hint="try again")

    async def get(self, scope: Scope, name: str) -> StoredSecret:
        """What is known about a secret; not its value.

        Raises:
            NotFound: nothing is stored under this name.
        """
        found = await self._read(scope, name)
        if found is None:
            raise NotFound(f"no secret {name} in {scope}", hint=hint_to_set(name))
        return _record(scope, found[1])

    async def all(self, scope: Scope) -> list[StoredSecret]:
        """What is known about every secret of an environment, by name."""
        prefix = f"{scope}."
        found = [each async for _, each, _ in self._all(prefix)]
        return sorted((_record(scope, each) for each in found), key=lambda each: each.name)

    async def delete(self, scope: Scope, name: str) -> StoredSecret:
        """Remove a secret; runs that execute keep the value they were given.

        Raises:
            NotFound: nothing is stored under this name.
        """
        gone = await self.get(scope, name)
        try:
            await (await self._bucket()).purge(_key(scope, name))
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        return gone

    async def missing(self, scope: Scope, names: tuple[str, ...]) -> list[str]:
        """Those of the names under which nothing is stored."""
        return [name for name in names if await self._read(scope, name) is None]

    async def values(self, scope: Scope, names: tuple[str, ...]) -> dict[str, str]:
        """The values of those of the names that are stored.

        Raises:
            HelmrError: a value cannot be decrypted.
        """
        values = {}
        for name in names:
            found = await self._read(scope, name)
            if found is not None:
                values[name] = self._open(scope, found[1])
        return values

    async def rotate(self) -> tuple[Key, int]:
        """Encrypt every secret with the current key; make a new key first, unless that was begun and not finished.

        Safe to repeat, and to interrupt at any point: old keys are forgotten only when nothing needs them any more.

        Raises:
            HelmrError: a secret cannot be decrypted.
        """
        async with self._lock:
            key = await self._current_key()
            unfinished = len(self.ring.known()) > 1
            if self.ring.owned and not unfinished:
                key = self.ring.make()
            count = 0
            while stale := [each async for each in self._all("") if each[1].key_id != key.id]:
                for scope, sealed, revision in stale:
                    count += await self._reseal(scope, sealed, revision, key)
            if self.ring.owned:
                self.ring.retire()
            return key, count

    async def _reseal(self, scope: Scope, sealed: Sealed, revision: int, key: Key) -> int:
        fresh = seal(scope, key, self._open(scope, sealed), sealed)
        # If somebody else has just changed it, it is looked at again.
        return int(await self._write(scope, fresh, revision))

    def _open(self, scope: Scope, sealed: Sealed) -> str:
        key = self.ring.find_key(sealed.key_id)
        if key is None:
            raise HelmrError(
                f"secret {sealed.name} is encrypted with the key {sealed.key_id}, which this server does not have",
                hint="give it that key, after the current one, or store the secret again: helmr secret set",
            )
        return unseal(scope, key, sealed)

    async def _current_key(self) -> Key:
        """The key to encrypt with, made when the first secret is stored.

        Raises:
            HelmrError: there is none, but secrets of an earlier one are stored: losing a key must not go unnoticed.
        """
        keys = self.ring.known()
        if keys:
            return keys[0]
        async for scope, sealed, _ in self._all(""):
            raise HelmrError(
                f"this server has no secret key, but {sealed.name} in {scope} is encrypted with {sealed.key_id}",
                hint="restore the file secret-key of its home folder, or delete the secrets and store them again",
            )
        return self.ring.make()

    # The bucket

    async def _bucket(self) -> KeyValue:
        return await self.nc.jetstream().key_value(topology.SECRETS_BUCKET)

    async def _read(self, scope: Scope, name: str) -> tuple[int, Sealed] | None:
        try:
            entry = await (await self._bucket()).get(_key(scope, name))
        except nats.js.errors.KeyNotFoundError:
            return None
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        return entry.revision or 0, msgspec.json.decode(entry.value or b"", type=Sealed)

    async def _write(self, scope: Scope, sealed: Sealed, revision: int | None) -> bool:
        """Whether nobody else was first."""
        bucket, key, data = await self._bucket(), _key(scope, sealed.name), msgspec.json.encode(sealed)
        try:
            if revision is None:
                await bucket.create(key, data)
            else:
                await bucket.update(key, data, last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            return False
        except (TimeoutError, nats.errors.Error) as error:
            raise _away(error) from error
        return True

    async def _all(self, prefix: str) -> AsyncIterator[tuple[Scope, Sealed, int]]:
        """Every secret whose key begins like this, with its revision."""
        base = topology.bucket_subject(topology.SECRETS_BUCKET, "")
        info = await api(self.nc, f"STREAM.INFO.KV_{topology.SECRETS_BUCKET}", {"subjects_filter": f"{base}{prefix}>"})
        if "error" in info:
            raise Unavailable(f"the bucket of secrets: {info['error'].get('description')}")
        for subject in sorted(info["state"].get("subjects") or {}):
            project, environment, name = subject.removeprefix(base).split(".")
            scope = Scope(project, environment)
            found = await self._read(scope, name)
            if found is not None:
                yield scope, found[1], found[0]


def _record(scope: Scope, sealed: Sealed) -> StoredSecret:
    return StoredSecret(
        name=sealed.name,
        project=scope.project,
        environment=scope.environment,
        version=sealed.version,
        key_id=sealed.key_id,
        created_at=sealed.created_at,
        updated_at=sealed.updated_at,
        updated_by=sealed.updated_by,
    )


def hint_to_set(name: str) -> str:
    """What to do about a secret that is missing."""
    return f"store it: helmr secret set {name}"


def _key(scope: Scope, name: str) -> str:
    return f"{scope}.{name}"


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"the bucket of secrets does not answer: {error}")
