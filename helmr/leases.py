"""Which leases of a run had nothing to prepare: an execution was still there, and went on."""

from __future__ import annotations

from collections.abc import Iterable

from helmr.events import RunEvent
from helmr.models import Event


def going_on(events: Iterable[RunEvent | Event]) -> set[int]:
    """The cursors of the leases under which an execution that waited, or lost its worker, goes on where it is.

    Such a lease names the ``execution``, or is of the worker and the attempt of the one that paused; and no ``started`` follows
    it. How it ends says nothing: it may fail or be cancelled, too. ``events`` are all of a run's, in order.
    """
    found: set[int] = set()
    holder = paused = None
    cursor, executing = 0, False
    for event in events:
        match event.kind:
            case "leased":
                holder, cursor = (event.data.get("worker"), event.attempt), event.cursor
                executing = holder == paused or bool(event.data.get("execution"))
                if executing:
                    found.add(cursor)
            case "started":
                found.discard(cursor)
                executing = True
            case "waiting" if executing:
                paused = holder
    return found
