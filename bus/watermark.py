"""How far the history has applied the log, published where control can read it: what is beyond it must not be deleted.

The projector writes the key after a committed batch, at most once a second; whoever deletes messages of ended runs reads
it first. A deletion may rely on it for ever: it only goes back when somebody begins another history.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats

from bus import topology
from helmr.errors import Unavailable


class Watermark(msgspec.Struct, frozen=True, kw_only=True):
    """The last sequence of each stream whose rows are safely in the history, and when that was written."""

    streams: dict[str, int]
    at: datetime

    def covers(self, stream: str, seq: int) -> bool:
        """Whether the history has applied the message."""
        return self.streams.get(stream, 0) >= seq


async def publish(nc: Nats, watermark: Watermark) -> None:
    """Put the watermark in place of the former one, without waiting for an answer: the next one makes up for a lost one.

    Raises:
        Unavailable: the connection is closed.
    """
    subject = topology.bucket_subject(topology.CONFIG_BUCKET, topology.WATERMARK_KEY)
    try:
        await nc.publish(subject, msgspec.json.encode(watermark))
    except (nats.errors.Error, OSError) as error:
        raise Unavailable(f"the watermark of the history is not stored: {type(error).__name__} {error}") from error


async def read(nc: Nats) -> Watermark | None:
    """The watermark; None if no projector has ever written one: then nothing has been applied.

    Raises:
        Unavailable: NATS does not answer.
    """
    try:
        bucket = await nc.jetstream().key_value(topology.CONFIG_BUCKET)
        entry = await bucket.get(topology.WATERMARK_KEY)
    except nats.js.errors.KeyNotFoundError:
        return None
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise Unavailable(f"the watermark of the history cannot be read: {type(error).__name__} {error}") from error
    return msgspec.json.decode(entry.value or b"", type=Watermark)
