"""Secrets that let whoever bears one do one thing: complete a token, or use what an access token is for.

A secret is ``<id of what it is for>.<random>``; only its hash is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

#: Random bytes in a secret: 256 bits.
_RANDOM = 32
#: Characters a secret may have before nobody looks at it.
_MAX_SECRET = 256
#: What a secret is compared with that names nothing: no hash is like it.
_NOBODY = "0" * 64


def new_secret(entity_id: str) -> str:
    """A fresh secret for the token or access token of that id."""
    return f"{entity_id}.{secrets.token_urlsafe(_RANDOM)}"


def named(secret: str) -> str:
    """The id that a secret names; it may be of nothing, and the secret wrong."""
    return secret.partition(".")[0]


def hashed(secret: str) -> str:
    """What is stored of a secret. It is random, so that a plain hash will do."""
    return hashlib.sha256(secret.encode()).hexdigest()


def fits(secret: str, stored: tuple[str, ...]) -> bool:
    """Whether one of the ``stored`` hashes is of this secret; takes the same time whichever it is, or none.

    So it does with nothing stored, because there is nothing by the name: nobody can find out by the time it takes.
    """
    if len(secret) > _MAX_SECRET:
        return False
    mark = hashed(secret)
    return any([hmac.compare_digest(mark, each) for each in stored or (_NOBODY,)])  # noqa: C419  all are compared
