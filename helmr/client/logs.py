"""A run's log as one gapless sequence, put together from what is stored and what arrives live."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from helmr.chunks import LogChunk

#: Chunks of one stream that may come before an earlier one; a worker has at most 8 under way.
_PATIENCE = 16


class Assembler:
    """Puts chunks in order by the byte offset of their stream, and drops what was seen before.

    After an outage of the server a few chunks may be stored behind later ones; they are waited for. What stays away (old
    chunks are dropped in the end) is a gap, and the next chunk follows it.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int, str], int] = {}
        self._early: dict[tuple[int, int, str], list[LogChunk]] = {}
        self._tombstones: set[tuple[int, int, str]] = set()

    def fits(self, chunk: LogChunk) -> bool:
        """Whether nothing is missing before this chunk."""
        return chunk.offset <= self._ends.get(_place(chunk), 0)

    def take(self, chunk: LogChunk) -> Iterator[LogChunk]:
        """What can be said now that this chunk is here: it, or the new part of it, and what waited for it."""
        place = _place(chunk)
        if chunk.tombstone is not None:
            if place not in self._tombstones:
                self._tombstones.add(place)
                yield chunk
            return
        early = self._early.setdefault(place, [])
        early.append(chunk)
        early.sort(key=_offset)
        while early and (len(early) > _PATIENCE or self.fits(early[0])):
            yield from self._emit(early.pop(0))

    def rest(self) -> Iterator[LogChunk]:
        """What still waits, when nothing more comes."""
        for early in self._early.values():
            while early:
                yield from self._emit(early.pop(0))

    def _emit(self, chunk: LogChunk) -> Iterator[LogChunk]:
        place = _place(chunk)
        fresh = chunk.data[max(self._ends.get(place, 0) - chunk.offset, 0) :]
        if fresh:
            self._ends[place] = chunk.offset + len(chunk.data)
            yield msgspec.structs.replace(chunk, offset=self._ends[place] - len(fresh), data=fresh)


def _place(chunk: LogChunk) -> tuple[int, int, str]:
    return chunk.attempt, chunk.dispatch, chunk.stream


def _offset(chunk: LogChunk) -> int:
    return chunk.offset
