"""Keeps what tasks say from commanding the terminal it is shown on.

An escape sequence in a log line, a failure or the name of a file could retitle a window, fill the clipboard, hide lines, or
have the terminal type an answer into the shell. Control characters are therefore shown as Python writes them, ``\\x1b``:

* :func:`tame`, and :class:`Tamer` for a stream, are for what stands by itself, and only where a person reads: in pipes and
  files bytes are what they are. Colours stay, and line ends, tabs and carriage returns (progress bars: they overwrite no
  more than their own line).
* :func:`printable` is for what stands among our own words, in an error, a row or a cell, and wherever those go. Only line
  ends and tabs stay: a colour or a carriage return, or what reorders text for the eye, would have our words say something else.
"""

from __future__ import annotations

import re

#: Select graphic rendition: colours, bold and the like. The only sequence that can do no more than look odd.
_HARMLESS = rb"\x1b\[[0-9;:]{0,64}m"
_WORDS = re.compile(_HARMLESS + rb"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")
#: What a chunk may end with that the next one makes harmless, or not.
_UNDECIDED = re.compile(rb"(?:\x1b(?:\[[0-9;:]{0,64})?|\xc2)\Z")
#: C0 and C1 controls but for line end and tab, and what reorders text for the eye.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Tamer:
    """One stream of bytes on its way to a terminal; a sequence may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> bytes:
        """What can be shown of the bytes so far."""
        data = self._rest + data
        found = _UNDECIDED.search(data)
        end = found.start() if found else len(data)
        self._rest = data[end:]
        return _tame(data[:end])

    def end(self) -> bytes:
        """What is left at the end of the stream."""
        rest, self._rest = self._rest, b""
        return _tame(rest)


def tame(text: str) -> str:
    """A whole text, fit for a terminal."""
    data = text.encode("utf-8", "surrogateescape")
    return _tame(data).decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """A part of what we say ourselves, without any character that would steer a terminal."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def _tame(data: bytes) -> bytes:
    return _WORDS.sub(_shown, data)


def _shown(match: re.Match[bytes]) -> bytes:
    found = match[0]
    if found.startswith(b"\x1b["):
        return found
    return repr(found.decode())[1:-1].encode()
