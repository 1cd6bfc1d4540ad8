"""The pure fold from log chunks to rows, and the day whose file each of them belongs in."""

from __future__ import annotations

from datetime import UTC, datetime

from bus.reader import Message
from helmr import chunks, subjects
from store.fold import Row
from store.messages import instant


def day_of(message: Message) -> str:
    """The UTC day, ``YYYYMMDD``, on which the log stored the chunk: it never goes back while sequences go on."""
    return datetime.fromtimestamp(message.stored_ns // 1_000_000_000, UTC).strftime("%Y%m%d")


def row_of(message: Message) -> Row:
    """In the order of :data:`store.tables.LOGS`.

    Raises:
        ValueError: the chunk cannot be understood.
    """
    subject = subjects.parse_log(message.subject)
    headers = message.headers or {}
    stored = instant(message.stored_ns)
    try:
        shown, raw = message.body.decode(), None
    except UnicodeDecodeError:
        shown, raw = message.body.decode(errors="replace"), message.body
    return (
        *(message.seq, *subject.scope, subject.id, subject.attempt, int(headers.get(chunks.HEADER_DISPATCH, 0))),
        *(subject.stream, int(headers.get(chunks.HEADER_OFFSET, 0)), headers.get(chunks.HEADER_AT, stored)),
        *(stored, len(message.body), headers.get(chunks.HEADER_TOMBSTONE), shown, raw),
    )
