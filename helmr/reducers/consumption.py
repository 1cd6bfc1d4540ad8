"""Which records of an input stream have been consumed: ranges of numbers, so that a long session costs a few bytes.

A wait that names a correlation id takes a record out of turn, and leaves those before it for others; so one number is not
enough to say how far a stream has been read.
"""

from __future__ import annotations

from helmr.events import Consumed


def has(consumed: Consumed, sequence: int) -> bool:
    """Whether the record of this number has been consumed."""
    return any(first <= sequence <= last for first, last in consumed.ranges)


def take(consumed: Consumed, sequence: int, seq: int) -> Consumed:
    """Consume the record numbered ``sequence``, which the log holds at ``seq``; twice is as good as once."""
    if has(consumed, sequence):
        return consumed
    merged: list[tuple[int, int]] = []
    for first, last in sorted((*consumed.ranges, (sequence, sequence))):
        if merged and merged[-1][1] + 1 == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    # Whatever follows the record that made the beginning longer may still be unread.
    begins = merged[0][0] == 1 and merged[0][0] <= sequence <= merged[0][1]
    return Consumed(ranges=tuple(merged), seq=seq if begins else consumed.seq)


def complete(consumed: Consumed, end: int) -> bool:
    """Whether all records of a stream that has ``end`` of them have been consumed."""
    return end == 0 or consumed.ranges == ((1, end),)
