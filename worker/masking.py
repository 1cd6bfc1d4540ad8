"""Takes the values of secrets out of whatever a run says: its output, its log lines, its result, its failure.

A value becomes ``***``. Of a value with several lines each line counts, too: tools print a key file line by line. Values
that were transformed (encoded, cut, reversed) are not recognised; this guards against accidents, not against the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

MASK = "***"
#: Shorter values are not masked: they would make a riddle of every log, and are no secrets.
MIN_LENGTH = 4
#: Lines of a value that are shorter than this say nothing about it: braces, ``key:``.
_MIN_LINE = 8


class Masker:
    """Masks a set of values."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        found = {part for value in values for part in _parts(value)}
        #: Longest first: of two values, one of which begins like the other, the longer one is meant.
        self._values = sorted(found, key=lambda value: (-len(value), value))
        self._text = re.compile("|".join(map(re.escape, self._values))) if found else None

    def text(self, text: str) -> str:
        """The text without the values."""
        return text if self._text is None else self._text.sub(MASK, text)

    def json(self, value: Any) -> Any:
        """The JSON value without the values, keys of objects included."""
        if self._text is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list | tuple):
            return [self.json(each) for each in value]
        if isinstance(value, dict):
            return {self.text(key): self.json(each) for key, each in value.items()}
        return value

    def stream(self) -> MaskedStream:
        """Masks bytes that come in pieces."""
        return MaskedStream([value.encode() for value in self._values])


class MaskedStream:
    """One stream of bytes, masked as a whole would be, however it is cut into pieces.

    What could be the beginning of a value is held back until more shows that it is not; everything else passes at once.
    """

    def __init__(self, values: list[bytes]) -> None:
        self._values = sorted(values, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._values))) if values else None
        self._held = b""

    @property
    def held(self) -> int:
        """How many bytes are held back."""
        return len(self._held)

    def feed(self, data: bytes) -> bytes:
        """The next piece, masked as far as it can be told."""
        if self._pattern is None:
            return data
        data = self._held + data
        done = []
        position = 0
        while True:
            open_end = self._beginning(data, position)
            match = self._pattern.search(data, position)
            if match is None or match.start() >= open_end:
                break
            done += [data[position : match.start()], MASK.encode()]
            position = match.end()
        self._held = data[open_end:]
        return b"".join([*done, data[position:open_end]])

    def end(self) -> bytes:
        """What is still held back, when nothing more comes."""
        held, self._held = self._held, b""
        return held if self._pattern is None else self._pattern.sub(MASK.encode(), held)

    def _beginning(self, data: bytes, start: int) -> int:
        """Where, from ``start`` on, the end of the data could be the beginning of a longer value; its length if nowhere."""
        earliest = len(data)
        for value in self._values:
            at = data.find(value[:1], max(start, len(data) - len(value) + 1), earliest)
            while at >= 0 and not value.startswith(data[at:]):
                at = data.find(value[:1], at + 1, earliest)
            if at >= 0:
                earliest = at
        return earliest


def _parts(value: str) -> list[str]:
    lines = [line.strip() for line in value.splitlines()]
    whole = [value.strip("\r\n"), value]
    return [part for part in whole if len(part) >= MIN_LENGTH] + [line for line in lines if len(line) >= _MIN_LINE]
