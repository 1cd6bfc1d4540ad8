"""What the tasks of the test-bed print, byte by byte; :func:`write_lines` in their project is the other half of it."""

from __future__ import annotations


def line(run_id: str, attempt: int, number: int, width: int) -> bytes:
    """The line that ``attempt`` of a run prints as its ``number``-th, counted from 0."""
    head = f"{run_id} {attempt} {number:08d} "
    return (head + "x" * max(width - len(head) - 1, 0) + "\n").encode()


def expected(run_id: str, attempt: int, size: int, width: int) -> bytes:
    """The first ``size`` bytes that the attempt prints, if it goes on for ever."""
    length = len(line(run_id, attempt, 0, width))
    return b"".join(line(run_id, attempt, number, width) for number in range(size // length + 1))[:size]
