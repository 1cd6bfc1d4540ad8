"""What the task modules imported so far have declared, and where: the index of a deployment is made from it.

Declaring is a side effect of importing, as authors expect of decorators; contradictions are refused at the second
declaration, while the traceback still points at it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from helmr.errors import ProjectError

if TYPE_CHECKING:
    from types import FrameType

    from helmr.declarations import Queue
    from helmr.sandbox import Sandbox
    from helmr.streams import InputStream, OutputStream
    from helmr.tasks import Task

T = TypeVar("T")


class Location(NamedTuple):
    """Where in the author's code something stands."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


tasks: dict[str, Task[Any, Any]] = {}
sandboxes: dict[str, Sandbox] = {}
queues: dict[str, Queue] = {}
streams: dict[str, OutputStream | InputStream] = {}

_locations: dict[tuple[str, str], Location] = {}


def caller() -> FrameType:
    """The innermost frame that is not Helmr's own: the author's line."""
    frame = sys._getframe(1)  # noqa: SLF001  inspect.currentframe is the same, but slow to import
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("helmr."):
        frame = frame.f_back
    return frame


def caller_location() -> Location:
    """Where the author calls Helmr from."""
    frame = caller()
    return Location(frame.f_code.co_filename, frame.f_lineno)


def declare(noun: str, known: dict[str, T], name: str, value: T, location: Location, *, unique: bool = False) -> None:
    """Record a declaration; saying the same thing again is fine unless the name has to be ``unique``.

    The same line declaring again is a reloaded module and replaces what it said before.

    Raises:
        ProjectError: the name stands for something else already; both places are named.
    """
    earlier = known.get(name)
    place = _locations.get((noun, name))
    if earlier is not None and place is not None and place != location and (unique or earlier != value):
        verb = "is defined twice" if unique else "is defined in two ways"
        raise ProjectError(
            f"{location}: {noun} {name!r} {verb}; the other definition is at {place}",
            hint=f"give one of them another name, or define the {noun} once and import it",
            details={"locations": [str(place), str(location)]},
        )
    known[name] = value
    _locations[noun, name] = location


def clear() -> None:
    """Forget everything that was declared."""
    for known in (tasks, sandboxes, queues, streams, _locations):
        known.clear()
