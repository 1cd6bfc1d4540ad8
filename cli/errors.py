"""Errors as people and scripts see them: ``error: …`` and ``hint: …`` on stderr, and an exit code that means something.

0 ok · 1 failure · 2 usage · 3 the run ended other than ``succeeded`` · 4 no connection or not allowed · 5 not found ·
6 conflict · 7 timed out · 130 interrupted · 141 the reader of stdout went away
"""

from __future__ import annotations

import os
import sys
import traceback

import click

from cli.controls import printable
from helmr.errors import HelmrError, Unavailable, cause

FAILURE, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_NATS_HINT = "it may be restarting, overloaded or out of disk: see `helmr doctor`, then try again"

#: What each exit code means, for the reference page.
EXIT_CODES = {
    0: "ok",
    1: "failure",
    2: "usage: the command line, a setting or the payload is wrong",
    3: "the run ended other than `succeeded`",
    4: "no connection, no engine, or not allowed",
    5: "not found",
    6: "conflict: somebody else was first, or the state forbids it",
    7: "timed out; what was waited for goes on",
    130: "interrupted with Ctrl-C",
    141: "the program that read stdout went away",
}


def report(error: BaseException, *, debug: bool) -> int:
    """Say on stderr what happened, and return the exit code for it."""
    told = _translated(cause(error))
    if isinstance(told, BrokenPipeError):
        return _silence()
    if debug and not isinstance(told, click.exceptions.Exit | KeyboardInterrupt):
        traceback.print_exception(error)
    match told:
        case click.exceptions.Exit():
            return told.exit_code
        case HelmrError():
            return _say(told.message, told.hint, told.exit_code, excerpt=told.details.get("excerpt"))
        case click.exceptions.NoArgsIsHelpError():
            click.echo(told.message, err=True)
            return USAGE
        case click.ClickException():
            return _say(_sentence(told), _click_hint(told), told.exit_code)
        case KeyboardInterrupt() | click.Abort():
            return INTERRUPTED
        case OSError():
            return _say(_os_message(told), None, FAILURE)
        case _:
            hint = None if debug else "this is a bug in Helmr; run it again with --debug for the traceback"
            return _say(f"{type(told).__name__}: {told}", hint, FAILURE)


def _translated(error: BaseException) -> BaseException:
    """What nats-py raises in Helmr's own terms; told by its module, which is not imported for a command that needs none."""
    if type(error).__module__.partition(".")[0] != "nats":
        return error
    return Unavailable(f"NATS did not do what was asked: {error}", hint=_NATS_HINT)


def _say(message: str, hint: str | None, code: int, *, excerpt: str | None = None) -> int:
    lines = [f"{click.style('error:', fg='red', bold=True)} {printable(message)}"]
    if excerpt:
        lines += [f"  {each}" for each in printable(excerpt).split("\n")]
    if hint:
        lines.append(f"{click.style('hint:', fg='cyan')} {printable(hint)}")
    click.echo("\n".join(lines), err=True, color=colour(sys.stderr))
    return code


def colour(stream: object) -> bool:
    """Whether to write colours to this stream: only to a terminal, and not where ``NO_COLOR`` is set."""
    return not os.environ.get("NO_COLOR") and bool(getattr(stream, "isatty", lambda: False)())


def _sentence(error: click.ClickException) -> str:
    guessed = isinstance(error, click.exceptions.NoSuchOption)  # its suggestions become the hint
    text = (error.message if guessed else error.format_message()).rstrip(".")
    text = text.replace("'[", "'").replace("]'", "'")  # an optional argument is named like a usage line shows it
    return text[:1].lower() + text[1:]


def _click_hint(error: click.ClickException) -> str | None:
    if isinstance(error, click.exceptions.NoSuchOption) and error.possibilities:
        return f"did you mean {error.possibilities[0]!r}?"
    hint: str | None = getattr(error, "hint", None)
    if hint is None and isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"see {error.ctx.command_path} --help"
    return hint


def _os_message(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _silence() -> int:
    """The reader went away: not an error. What is still buffered must not raise again when Python ends."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(devnull, stream.fileno())
    return BROKEN_PIPE
