"""A run's log put together from chunks that come twice, overlap, or come in another order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from helmr.chunks import LogChunk
from helmr.client.logs import Assembler

_AT = datetime(2026, 3, 1, tzinfo=UTC)


def _chunk(
    offset: int, data: bytes, *, stream: str = "stdout", dispatch: int = 1, tombstone: str | None = None
) -> LogChunk:
    return LogChunk(
        seq=0, attempt=1, dispatch=dispatch, stream=stream, offset=offset, at=_AT, data=data, tombstone=tombstone
    )


def _read(chunks: Iterable[LogChunk]) -> list[LogChunk]:
    assembler = Assembler()
    return [fresh for chunk in chunks for fresh in assembler.take(chunk)] + list(assembler.rest())


def _joined(chunks: Iterable[LogChunk]) -> bytes:
    return b"".join(chunk.data for chunk in chunks)


def test_chunks_in_order_pass_at_once() -> None:
    assembler = Assembler()
    for offset, data in ((0, b"ab"), (2, b"c"), (3, b"def")):
        assert [fresh.data for fresh in assembler.take(_chunk(offset, data))] == [data]


def test_what_was_seen_before_is_dropped() -> None:
    assert _joined(_read([_chunk(0, b"abc"), _chunk(0, b"abc"), _chunk(1, b"bcd"), _chunk(2, b"c")])) == b"abcd"


def test_the_new_part_of_a_chunk_has_its_own_offset() -> None:
    fresh = _read([_chunk(0, b"abc"), _chunk(1, b"bcde")])
    assert [(chunk.offset, chunk.data) for chunk in fresh] == [(0, b"abc"), (3, b"de")]


def test_a_chunk_that_comes_early_waits_for_the_one_before() -> None:
    assembler = Assembler()
    assert list(assembler.take(_chunk(0, b"a"))) != []
    assert list(assembler.take(_chunk(2, b"c"))) == []
    assert not assembler.fits(_chunk(3, b"d"))
    assert _joined(assembler.take(_chunk(1, b"b"))) == b"bc"
    assert assembler.fits(_chunk(3, b"d"))


def test_what_stays_away_is_a_gap() -> None:
    fresh = _read([_chunk(0, b"a"), _chunk(5, b"f"), _chunk(6, b"g")])
    assert [(chunk.offset, chunk.data) for chunk in fresh] == [(0, b"a"), (5, b"f"), (6, b"g")]


def test_a_long_log_without_its_beginning_is_not_kept_waiting() -> None:
    assembler = Assembler()
    said = [sum(1 for _ in assembler.take(_chunk(1000 + n, b"x"))) for n in range(100)]
    assert sum(said) > 80
    assert sum(said) + sum(1 for _ in assembler.rest()) == 100


def test_streams_and_dispatches_are_apart() -> None:
    chunks = [_chunk(0, b"a"), _chunk(0, b"b", stream="stderr"), _chunk(0, b"c", dispatch=2)]
    assert _joined(_read(chunks)) == b"abc"


def test_a_tombstone_is_told_once() -> None:
    told = _read([_chunk(0, b"a"), _chunk(1, b"", tombstone="truncated"), _chunk(1, b"", tombstone="truncated")])
    assert [chunk.tombstone for chunk in told] == [None, "truncated"]


@st.composite
def _deliveries(draw: st.DrawFn) -> tuple[bytes, list[LogChunk]]:
    """A text, and its chunks with repetitions, none of them more than seven places early."""
    text = draw(st.binary(min_size=1, max_size=200))
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=20))})
    chunks = [_chunk(a, text[a:b]) for a, b in itertools.pairwise(cuts)]
    delays = draw(st.lists(st.integers(0, 7), min_size=len(chunks), max_size=len(chunks)))
    late = sorted(range(len(chunks)), key=lambda n: n + delays[n])
    order = [chunks[n] for n in late]
    for repeat in draw(st.lists(st.sampled_from(chunks), max_size=3)):
        order.insert(draw(st.integers(order.index(repeat) + 1, len(order))), repeat)
    return text, order


@given(_deliveries())
def test_whatever_the_order_every_byte_comes_once(case: tuple[bytes, list[LogChunk]]) -> None:
    text, order = case
    fresh = _read(order)
    assert _joined(fresh) == text
    assert [chunk.offset for chunk in fresh] == sorted(chunk.offset for chunk in fresh)
