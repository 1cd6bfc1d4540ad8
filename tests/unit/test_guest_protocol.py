"""The wire formats and the journal: nothing depends on how bytes were cut, and nothing unacknowledged is ever dropped."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr.guest import journal, protocol
from helmr.guest.journal import Journal
from helmr.guest.protocol import FrameReader, MessageReader, ProtocolError

_frames = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=200)),
    max_size=8,
)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(_frames, st.lists(st.integers(0, 10_000), max_size=10))
def test_frames_survive_any_cutting(frames: list[tuple[int, int, int, bytes]], cuts: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(protocol.frame(*frame) for frame in frames)
    assert [frame for piece in _pieces(data, cuts) for frame in reader.feed(piece)] == frames


@given(st.lists(st.dictionaries(st.text(), st.integers()), max_size=5), st.lists(st.integers(0, 10_000), max_size=10))
def test_messages_survive_any_cutting(bodies: list[dict[str, int]], cuts: list[int]) -> None:
    reader = MessageReader()
    data = b"".join(protocol.encode_message(body) for body in bodies)
    texts = [text for piece in _pieces(data, cuts) for text in reader.feed(piece)]
    assert [protocol.LENGTH.pack(len(text)) + text for text in texts] == [
        protocol.encode_message(body) for body in bodies
    ]


def test_a_frame_that_announces_too_much_is_refused_before_it_comes() -> None:
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        FrameReader().feed(protocol.HEADER.pack(1, 1, 1, protocol.MAX_FRAME + 1))


def test_a_message_that_announces_too_much_is_refused_before_it_comes() -> None:
    with pytest.raises(ProtocolError, match="1048577 bytes exceeds"):
        MessageReader().feed(protocol.LENGTH.pack(protocol.MAX_MESSAGE + 1))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b"[]", "list"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
    ],
)
def test_only_json_objects_that_every_reader_accepts_pass(text: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        protocol.check_message(text)


@pytest.mark.parametrize(
    "text", [b"{}", b'{"op": "log", "n": 1.5}', '{"a": "\N{GRINNING FACE}"}'.encode(), b'{"a": "\\ud83d\\ude00"}']
)
def test_ordinary_messages_pass(text: bytes) -> None:
    protocol.check_message(text)


def _taken(entries: Journal, budget: int = 1 << 30) -> list[int]:
    parts: list[bytes] = []
    entries.take(parts, budget)
    return [sequence for _, _, sequence, _ in FrameReader().feed(b"".join(parts))]


def test_frames_go_out_once_and_again_only_after_a_rewind() -> None:
    entries = Journal(7)
    for number in range(6):
        entries.append(protocol.MESSAGE, b"%d" % number)
    assert _taken(entries, 1) == [1]
    assert _taken(entries) == [2, 3, 4, 5, 6]
    assert not entries.waiting
    entries.acknowledge(3)
    entries.append(protocol.MESSAGE, b"6")
    entries.rewind()
    assert _taken(entries) == [4, 5, 6, 7]


def test_an_acknowledgement_covers_what_was_not_sent_on_this_connection() -> None:
    entries = Journal(1)
    for _ in range(4):
        entries.append(protocol.MESSAGE, b"x")
    entries.acknowledge(3)
    assert _taken(entries) == [4]
    entries.acknowledge(4)
    assert (entries.held, entries.frames_held, entries.last) == (0, 0, 4)


@pytest.mark.parametrize("size", [0, protocol.CHUNK])
def test_the_journal_is_full_by_bytes_or_by_frames(size: int) -> None:
    entries = Journal(1)
    while not entries.full:
        entries.append(protocol.STDOUT, b"x" * size, protocol.OFFSET.pack(0))
    assert entries.held <= journal.WINDOW_BYTES + protocol.CHUNK + 25
    assert entries.frames_held <= journal.WINDOW_FRAMES
    entries.acknowledge(1)
    assert not entries.full


@given(st.lists(st.sampled_from(["append", "take", "acknowledge", "rewind"]), max_size=60))
def test_everything_unacknowledged_can_be_had_again(actions: list[str]) -> None:
    entries = Journal(1)
    acknowledged = 0
    for action in actions:
        if action == "append":
            entries.append(protocol.MESSAGE, b"body")
        elif action == "take":
            _taken(entries, 40)
        elif action == "rewind":
            entries.rewind()
        else:
            acknowledged = (acknowledged + entries.last) // 2
            entries.acknowledge(acknowledged)
    entries.rewind()
    assert _taken(entries) == list(range(acknowledged + 1, entries.last + 1))
