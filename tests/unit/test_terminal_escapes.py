"""What is typed into a shell: for the program in the workspace, or for us."""

from __future__ import annotations

import pytest

from cli.terminal_session import Escape, Escapes


def _take(*typed: bytes) -> list[bytes | Escape]:
    """What came of it, with neighbouring bytes joined."""
    escapes = Escapes()
    found: list[bytes | Escape] = []
    for part in (part for piece in typed for part in escapes.take(piece)):
        if isinstance(part, bytes) and found and isinstance(found[-1], bytes):
            found[-1] += part
        elif part:
            found.append(part)
    return found


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Escape.END]),
        (b"ls\r~d", [b"ls\r", Escape.LEAVE]),
        (b"~?ls", [Escape.HELP, b"ls"]),
        (b"~~.", [b"~."]),
        (b"cd ~.", [b"cd ~."]),
        (b"~/bin\r", [b"~/bin\r"]),
        (b"\r~~\r~.", [b"\r~\r", Escape.END]),
        (b"\x00\xff~", [b"\x00\xff~"]),
    ],
)
def test_escapes(typed: bytes, taken: list[bytes | Escape]) -> None:
    assert _take(typed) == taken
    assert _take(*(typed[at : at + 1] for at in range(len(typed)))) == taken
