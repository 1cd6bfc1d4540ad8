"""Ids that are prefixed, sort by time, and are safe as one token of a NATS subject.

An id is ``<prefix>_`` and 24 characters of Crockford base32 (lower case): 48 bits of milliseconds since 1970, 72 bits of
randomness. Ids derived from a request (:func:`derive`) keep the time of the request, so that a retry of the same request
names the same entity.
"""

from __future__ import annotations

import hashlib
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARS = 10
_RANDOM_CHARS = 14

#: The prefixes in use: run, session, workspace, deployment, token, access token, exec, PTY, schedule, version, worker, host,
#: event, record, request.
PREFIXES = ("run", "ses", "ws", "dep", "tok", "acc", "exec", "pty", "sch", "ver", "wrk", "host", "evt", "rec", "req")


def _encode(value: int, length: int) -> str:
    chars = [_ALPHABET[(value >> shift) & 31] for shift in range(5 * (length - 1), -1, -5)]
    return "".join(chars)


def new(prefix: str) -> str:
    """A fresh id, e.g. ``run_01jd3v8k2m0qk5s8c9x7t4wz``."""
    return f"{prefix}_{_encode(time.time_ns() // 1_000_000, _TIME_CHARS)}{_encode(secrets.randbits(70), _RANDOM_CHARS)}"


def derive(prefix: str, *parts: str, at_ms: int | None = None) -> str:
    """The id that ``parts`` always lead to: the same request, retried, names the same entity.

    ``at_ms`` (milliseconds since 1970) is kept as the time part, so that derived ids sort like fresh ones; it belongs to the
    request and must be the same in every retry. Without it the time part is taken from the digest too.
    """
    digest = int.from_bytes(hashlib.sha256("\0".join((prefix, *parts)).encode()).digest(), "big")
    head = (digest >> 70) & ((1 << 50) - 1) if at_ms is None else at_ms
    return f"{prefix}_{_encode(head, _TIME_CHARS)}{_encode(digest & ((1 << 70) - 1), _RANDOM_CHARS)}"


def time_ms(text: str) -> int:
    """The time part of an id, in milliseconds since 1970."""
    value = 0
    for char in text.partition("_")[2][:_TIME_CHARS]:
        value = value << 5 | _ALPHABET.index(char)
    return value


def is_id(text: str, prefix: str) -> bool:
    """Whether ``text`` is a complete id with this prefix (not a shortened one)."""
    head, _, body = text.partition("_")
    return head == prefix and len(body) == _TIME_CHARS + _RANDOM_CHARS and set(body) <= set(_ALPHABET)
