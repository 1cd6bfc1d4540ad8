"""What a task prints cannot command the terminal of whoever looks at it."""

from __future__ import annotations

import io
import sys

import pytest

from cli import output
from cli.controls import Tamer, tame
from cli.follow import LogPrinter
from tests.unit.test_cli_output import chunk

#: Retitle, fill the clipboard, clear, move, ask for an answer that is typed, hide, a C1 introducer, a device control string.
COMMANDS = [
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1b[2J",
    "\x1b[1;1H",
    "\x1b[6n",
    "\x1b[?25l",
    "\x9b2J",
    "\x1bP+q544e\x1b\\",
    "\x1bc",
    "\x08\x08\x08",
    "\x1b[8m\x1b[31;2J",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_shown_and_not_obeyed(command: str) -> None:
    shown = tame(f"before {command} after")
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    rest = shown.replace("\x1b[8m", "").replace("\x1b[31m", "")
    assert rest.isprintable(), rest


def test_colours_and_lines_stay() -> None:
    text = "\x1b[31;1mred\x1b[0m\ttab\r\n50 %\r100 %\n\x1b[38:2:1:2:3mü€\N{SNOWMAN}\x1b[m"
    assert tame(text) == text
    assert tame("no encoding: \udcff") == "no encoding: \udcff"


@pytest.mark.parametrize("command", COMMANDS)
def test_it_does_not_matter_where_a_stream_is_cut(command: str) -> None:
    data = f"\x1b[31mred{command}ü\x1b[0m\x1b".encode()
    whole = tame(data.decode()).encode()
    for cut in range(len(data) + 1):
        tamer = Tamer()
        assert tamer.take(data[:cut]) + tamer.take(data[cut:]) + tamer.end() == whole


class _Screen(io.TextIOWrapper):
    """A stdout that is a terminal, or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(), "utf-8", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def shown(self) -> bytes:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_is_protected(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
    screen = _Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    printer = LogPrinter()
    printer.take(chunk("stdout", b"a\x1b]0;ti"))
    printer.take(chunk("stdout", b"tle\x07b\n"))
    output.line("c\x1b[2Jd")
    output.table(("NAME",), [("e\x1bcf",)])
    shown = screen.shown()
    if terminal:
        assert b"a\\x1b]0;title\\x07b\n" in shown
        assert b"c\\x1b[2Jd" in shown
        assert b"e\\x1bcf" in shown
    else:
        assert b"a\x1b]0;title\x07b\n" in shown
        assert b"e\x1bcf" in shown


@pytest.mark.parametrize(("last", "shown"), [(b"\xc2", b"a\xc2"), (b"\x1b", b"a\\x1b"), (b"\x1b[31", b"a\\x1b[31")])
def test_the_end_of_a_log_is_shown(monkeypatch: pytest.MonkeyPatch, last: bytes, shown: bytes) -> None:
    screen = _Screen(terminal=True)
    monkeypatch.setattr(sys, "stdout", screen)
    printer = LogPrinter()
    printer.take(chunk("stdout", b"a" + last))
    assert screen.shown() == b"a"
    printer.end()
    assert screen.shown() == shown
