"""What a reactor is made of: a name for its consumer, the facts it sees, and what it does about each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from bus import topology
from bus.pull import Delivery

Handler = Callable[[Delivery], Awaitable[None]]


class Reaction(NamedTuple):
    """``handler`` gets each message under ``filters``, at least once; it may raise Conflict or NotFound when it is moot."""

    name: str
    filters: list[str]
    handler: Handler
    stream: str = topology.RUNS
