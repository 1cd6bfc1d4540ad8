"""Tokens: one-shot completions by whoever the task hands them to: a person's click, a webhook, another program.

Outside of a task, tokens are ``client.tokens`` and ``helmr token``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from helmr import jsonform, runtime
from helmr.durations import Duration, seconds
from helmr.errors import TooLarge, UsageError
from helmr.jsonform import ConversionError, to_builtins
from helmr.tags import check_tags
from helmr.waiting import Request, wait, wait_async

#: Seconds a token can be completed in, unless told otherwise.
DEFAULT_TIMEOUT = 7 * 86400.0
#: Limits of a token: seconds, bytes of JSON.
MAX_TIMEOUT = 365 * 86400.0
MAX_METADATA = 64 * 1024


@dataclass(frozen=True)
class Token:
    """A token as a task holds it.

    Attributes:
        id: what the client and the HTTP endpoint complete it by.
        expires_at: when it can no longer be completed; None for a token of somebody else's.
    """

    id: str
    expires_at: datetime | None = None

    def wait(self, timeout: Duration | None = None) -> Any:
        """What the token is completed with.

        Raises:
            WaitTimeout: it was not completed in time (``timeout``, or its own).
            WaitCancelled: it was cancelled.
        """
        return wait(f"token {self.id}", self._request(timeout))

    async def wait_async(self, timeout: Duration | None = None) -> Any:  # noqa: ASYNC109
        """:meth:`wait`, awaited."""
        return await wait_async(f"token {self.id}", self._request(timeout))

    def secret(self) -> str:
        """A new secret that completes this token, and nothing else, over HTTP: ``POST /v1/callbacks/<secret>``.

        It is stored as a hash and shown here only. The call is not recorded: make it in the step that hands the secret on.
        """
        answer = runtime.required("token.secret").ask({"op": "secret", "token": self.id})
        found: str = answer["secret"]
        return found

    def _request(self, timeout: Duration | None) -> Request:
        limit = None if timeout is None else seconds(timeout, what="timeout")
        return {"kind": "token", "token": self.id, "timeout": limit}


def create(
    timeout: Duration = DEFAULT_TIMEOUT, *, tags: Iterable[str] = (), metadata: Mapping[str, Any] | None = None
) -> Token:
    """A new token; the same one when the task's code runs again.

    Args:
        timeout: how long it can be completed, at most 365 d.
        tags: at most 10 of 128 characters; tokens are listed by them.
        metadata: at most 64 KiB of JSON, for whoever completes it.
    """
    run, wanted = runtime.required("tokens.create"), _wanted(timeout, tags, metadata)
    slot = run.claim("token", "")
    answer = slot.entry
    if answer is None:
        answer = run.ask({"op": "token", **slot.key, **wanted})
    return _made(answer)


async def create_async(
    timeout: Duration = DEFAULT_TIMEOUT,  # noqa: ASYNC109
    *,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Token:
    """:func:`create`, awaited."""
    run, wanted = runtime.required("tokens.create"), _wanted(timeout, tags, metadata)
    slot = run.claim("token", "")
    answer = slot.entry
    if answer is None:
        answer = await run.ask_async({"op": "token", **slot.key, **wanted})
    return _made(answer)


def get(token_id: str) -> Token:
    """A token that was made elsewhere, to wait for."""
    return Token(token_id)


def _wanted(timeout: Duration, tags: Iterable[str], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    limit, chosen = seconds(timeout, what="timeout"), sorted(set(tags))
    if not 0 < limit <= MAX_TIMEOUT:
        raise UsageError(f"a token's timeout of {limit:g} s is not between 0 and 365 d")
    check_tags(chosen, of="a token")
    try:
        document = to_builtins(dict(metadata or {}))
    except ConversionError as failure:
        raise UsageError(f"the metadata of a token: {failure}") from None
    if len(jsonform.encode(document)) > MAX_METADATA:
        raise TooLarge(f"the metadata of a token exceeds {MAX_METADATA >> 10} KiB of JSON")
    return {"timeout": limit, "tags": chosen, "metadata": document}


def _made(answer: dict[str, Any]) -> Token:
    return Token(answer["token"], datetime.fromisoformat(answer["expires_at"]))
