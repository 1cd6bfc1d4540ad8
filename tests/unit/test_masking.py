"""Values of secrets never get out of a run, however its output is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.masking import Masker

#: Few letters, so that values overlap, contain each other and begin like each other.
_VALUES = st.lists(st.text("ab\n", min_size=4, max_size=7), min_size=1, max_size=3)
_PIECES = st.lists(st.text("ab\nx", max_size=9).map(str.encode), max_size=12)


@given(_VALUES, _PIECES)
def test_pieces_are_masked_like_the_whole(values: list[str], pieces: list[bytes]) -> None:
    masker = Masker(values)
    stream = masker.stream()
    out = b"".join([*(stream.feed(piece) for piece in pieces), stream.end()])
    assert out.decode() == masker.text(b"".join(pieces).decode())
    for value in values:
        assert value not in out.decode()


@given(_VALUES, _PIECES)
def test_no_more_is_held_back_than_could_begin_a_value(values: list[str], pieces: list[bytes]) -> None:
    stream = Masker(values).stream()
    masked = stream._values
    taken = b""
    for piece in pieces:
        taken += piece
        stream.feed(piece)
        held = stream._held
        assert taken.endswith(held)
        assert not held or any(value.startswith(held) and value != held for value in masked)


def test_a_line_that_begins_no_value_passes_at_once() -> None:
    stream = Masker(["s3cr3t-value"]).stream()
    assert stream.feed(b"working\n") == b"working\n"
    assert stream.feed(b"token: s3cr") == b"token: "
    assert stream.feed(b"3t-value!\n") == b"***!\n"
    assert stream.feed(b"s3cr") == b""
    assert stream.feed(b"atch\n") == b"s3cratch\n"
    assert stream.feed(b"s3") == b""
    assert stream.end() == b"s3"


def test_of_two_values_the_longer_one_is_meant() -> None:
    masker = Masker(["token", "token-of-ada"])
    assert masker.text("token token-of-ada") == "*** ***"
    stream = masker.stream()
    assert stream.feed(b"token") == b""
    assert stream.feed(b"-of-ad") == b""
    assert stream.feed(b"a ") == b"*** "


def test_every_line_of_a_key_is_masked() -> None:
    masker = Masker(["-----BEGIN KEY-----\nMIIEvQIBADANBg\nab\n-----END KEY-----\n"])
    assert masker.text("> MIIEvQIBADANBg <") == "> *** <"
    assert masker.text("cab") == "cab"


@pytest.mark.parametrize("value", ["abc", "", "\n\n"])
def test_values_that_are_too_short_are_let_through(value: str) -> None:
    masker = Masker([value])
    assert masker.text("abc\n\n") == "abc\n\n"
    assert masker.stream().feed(b"abc\n\n") == b"abc\n\n"


def test_json_is_masked_down_to_its_keys() -> None:
    masker = Masker(["s3cr3t"])
    found = masker.json({"a": ["s3cr3t", 1, None], "my s3cr3t": {"b": "xs3cr3tx"}, "c": ("s3cr3t",)})
    assert found == {"a": ["***", 1, None], "my ***": {"b": "x***x"}, "c": ["***"]}
