"""Single messages of streams: stored, and read back by their subjects; what nats-py raises becomes an error of ours."""

from __future__ import annotations

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import RawStreamMsg

from helmr.errors import Conflict, HelmrError, TooLarge, Unavailable

#: Seconds to wait for the server's acknowledgement.
PUBLISH_TIMEOUT = 5.0
#: "wrong last sequence", as the stream's leader and as its in-flight check put it.
_CONFLICTS = frozenset({10071, 10164})
_MAX_PAYLOAD = 10054


class Superseded(Conflict):
    """Somebody else appended first; read the last event and decide again."""


async def publish(js: JetStreamContext, subject: str, body: bytes, headers: dict[str, str]) -> int:
    """Have a message stored; returns its sequence.

    Raises:
        Superseded: another message than the one that the headers expect was there.
        TooLarge: the server, or the stream, takes no message of this size.
        Unavailable: the server does not acknowledge: whether it has stored the message is not known.
    """
    try:
        ack = await js.publish(subject, body, timeout=PUBLISH_TIMEOUT, headers=headers)
    except nats.js.errors.APIError as error:
        raise _translate(error) from error
    except nats.errors.MaxPayloadError as error:
        raise TooLarge(f"a message of {len(body)} bytes exceeds the server's max_payload") from error
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS does not acknowledge: {type(error).__name__} {error}") from error
    return ack.seq


async def get_message(
    js: JetStreamContext, stream: str, subject: str, *, after: int | None = None, direct: bool = True
) -> tuple[int, bytes] | None:
    """Sequence and body of what :func:`stored_message` finds; raises what that does."""
    message = await stored_message(js, stream, subject, after=after, direct=direct)
    return None if message is None else (message.seq or 0, message.data or b"")


async def stored_message(
    js: JetStreamContext, stream: str, subject: str, *, after: int | None = None, direct: bool = True
) -> RawStreamMsg | None:
    """The last message of ``stream`` under a filter, or with ``after`` the first one beyond that sequence; None if none.

    Not ``direct``: the stream's leader is asked, and not whichever replica is near.

    Raises:
        Unavailable: the server does not answer.
    """
    try:
        if after is None:
            return await js.get_msg(stream, subject=subject, direct=direct)
        return await js.get_msg(stream, seq=after + 1, subject=subject, direct=direct, next=True)
    except nats.js.errors.NotFoundError:
        return None
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"NATS does not answer: {type(error).__name__} {error}") from error


def _translate(error: nats.js.errors.APIError) -> HelmrError:
    if error.err_code in _CONFLICTS:
        return Superseded("another message came first")
    if error.err_code == _MAX_PAYLOAD:
        return TooLarge("the message exceeds the stream's message size")
    if error.code == 503:
        return Unavailable(f"JetStream is not ready: {error.description}")
    return HelmrError(f"JetStream refuses the message: {error.description}", details={"err_code": error.err_code})
