"""The keys that secrets are encrypted with: where they come from, which one is current, and how a new one takes its place.

A key is 32 random bytes, written in base64; a ring has one per line, the current one first. The others are accepted for
reading until everything has been encrypted anew.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from helmr.errors import ConfigError

#: Bytes of a key: AES-256.
KEY_BYTES = 32
#: Where control keeps the keys it made itself, below ``HELMR_HOME``.
FILE_NAME = "secret-key"


class Key(msgspec.Struct, frozen=True):
    """One key; ``id`` is derived from it, and tells nothing about it."""

    id: str
    raw: bytes

    def __repr__(self) -> str:
        return f"Key({self.id!r})"

    @classmethod
    def of(cls, raw: bytes) -> Key:
        """The key of these bytes."""
        return cls(f"k_{hashlib.sha256(b'helmr secret key ' + raw).hexdigest()[:16]}", raw)


class KeyRing:
    """The keys of one control process: from ``text``, or from the file ``path``, made there when first needed.

    ``owned`` says that the file is ours to write: only then can a new key be made.
    """

    def __init__(self, *, text: str | None = None, path: Path | None = None, owned: bool = False) -> None:
        self._path = path
        self.owned = owned and path is not None
        self._keys = _parse(text, "HELMR_SECRET_KEY") if text is not None else ()
        self._fixed = text is not None

    @classmethod
    def find(cls, home: Path, *, file: Path | None = None, text: str | None = None) -> KeyRing:
        """The ring that a server was told to use: a file, the text of ``HELMR_SECRET_KEY``, or its own in ``home``.

        Raises:
            ConfigError: the file or the text holds no keys.
        """
        if file is not None:
            ring = cls(path=file)
            ring.reload()
            return ring
        if text is not None:
            return cls(text=text)
        return cls(path=home / FILE_NAME, owned=True)

    def known(self) -> Sequence[Key]:
        """The keys there are, the current one first; none if none has been made yet.

        Raises:
            ConfigError: the file cannot be read, or holds something else.
        """
        if not self._keys:
            self.reload()
        return self._keys

    def find_key(self, key_id: str) -> Key | None:
        """The key with this id, looking at the file again if it is not known."""
        for again in (False, True):
            if again:
                self.reload()
            for key in self.known():
                if key.id == key_id:
                    return key
        return None

    def reload(self) -> None:
        """Read the file again, if there is one."""
        if self._fixed or self._path is None:
            return
        try:
            self._keys = _parse(self._path.read_text(), str(self._path))
        except FileNotFoundError as error:
            if not self.owned:
                raise ConfigError(
                    f"no secret key in {self._path}", hint="make one with `openssl rand -base64 32`"
                ) from error
            self._keys = ()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the secret key in {self._path} cannot be read: {error}") from error

    def make(self) -> Key:
        """Put a new key first, and write the file before it is used.

        Raises:
            ConfigError: the keys are not ours to write, or the file cannot be written.
        """
        key = Key.of(secrets.token_bytes(KEY_BYTES))
        self._write((key, *self.known()))
        return key

    def retire(self) -> None:
        """Forget all keys but the current one."""
        if len(self.known()) > 1:
            self._write(self.known()[:1])

    def _write(self, keys: Sequence[Key]) -> None:
        if not self.owned or self._path is None:
            raise ConfigError(
                "the secret keys of this server are given to it", hint="put a new key before the old one there"
            )
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        text = "".join(f"{base64.b64encode(key.raw).decode()}\n" for key in keys)
        try:
            with contextlib.suppress(FileNotFoundError):
                draft.unlink()
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
                target.write(text)
                target.flush()
                os.fsync(target.fileno())
            draft.replace(self._path)
            _sync(self._path.parent)
        except OSError as error:
            raise ConfigError(f"the secret key cannot be kept in {self._path}: {error.strerror}") from error
        self._keys = tuple(keys)


def _parse(text: str, origin: str) -> tuple[Key, ...]:
    """The keys of a text, separated by white space or commas."""
    keys = []
    for word in text.replace(",", " ").split():
        try:
            raw = base64.b64decode(word, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != KEY_BYTES:
            raise ConfigError(
                f"{origin} holds something that is no key",
                hint="a key is 32 bytes in base64: `openssl rand -base64 32`",
            )
        keys.append(Key.of(raw))
    if not keys:
        raise ConfigError(f"{origin} holds no key", hint="make one with `openssl rand -base64 32`")
    return tuple(keys)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
