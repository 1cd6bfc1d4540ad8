"""A run's log as one gapless sequence, put together from what is stored and what arrives live."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from helmr import subjects


class LogChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one stream (``stdout``, ``stderr``, or ``log``: JSON lines); ``tombstone`` says why a stream ends early.

    ``seq`` orders stored chunks; a live one has 0.
    """

    seq: int
    attempt: int
    dispatch: int
    stream: str
    offset: int
    at: datetime
    data: bytes
    tombstone: str | None = None


def from_message(subject: str, headers: dict[str, str], data: bytes) -> LogChunk:
    """The chunk of a live message."""
    place = subjects.parse_log(subject)
    return LogChunk(
        seq=0,
        attempt=place.attempt,
        dispatch=int(headers["Helmr-Dispatch"]),
        stream=place.stream,
        offset=int(headers["Helmr-Offset"]),
        at=datetime.fromisoformat(headers["Helmr-At"]),
        data=data,
        tombstone=headers.get("Helmr-Tombstone"),
    )


class Assembler:
    """Drops what was seen before and notices what is missing, by the byte offset of each stream."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int, str], int] = {}
        self._tombstones: set[tuple[int, int, str]] = set()

    def fits(self, chunk: LogChunk) -> bool:
        """Whether nothing is missing before this chunk."""
        return chunk.offset <= self._ends.get(_place(chunk), 0)

    def take(self, chunk: LogChunk) -> Iterator[LogChunk]:
        """The part of a chunk that is new, if any."""
        place = _place(chunk)
        if chunk.tombstone is not None:
            if place not in self._tombstones:
                self._tombstones.add(place)
                yield chunk
            return
        end = self._ends.get(place, 0)
        fresh = chunk.data[max(end - chunk.offset, 0) :] if chunk.offset <= end else chunk.data
        if fresh:
            self._ends[place] = chunk.offset + len(chunk.data)
            yield msgspec.structs.replace(chunk, offset=self._ends[place] - len(fresh), data=fresh)

    def complete(self, attempt: int | None, dispatch: int, totals: dict[str, Any]) -> bool:
        """Whether everything that the terminal event counts has been taken."""
        if attempt is None or totals.get("truncated"):
            return False
        streams = ("stdout", "stderr", "log")
        return all(self._ends.get((attempt, dispatch, name), 0) >= totals.get(name, 0) for name in streams)


def _place(chunk: LogChunk) -> tuple[int, int, str]:
    return chunk.attempt, chunk.dispatch, chunk.stream
