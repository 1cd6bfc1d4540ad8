"""Timers of runs, as JetStream message schedules: they survive every restart and fire within a quarter of a second.

Publish the timer first, then the event that makes it matter; a timer nobody needs any more fires into the void. To drop one,
send :func:`cancel_header` with the event that makes it moot: event and cancellation are one message.
"""

from __future__ import annotations

from datetime import UTC, datetime

from bus.log import Log
from helmr import subjects
from helmr.subjects import Scope


async def arm(log: Log, scope: Scope, run_id: str, what: str, at: datetime) -> None:
    """Have ``helmr.due.<scope>.run.<run_id>.<what>`` published at ``at``; arming again moves it.

    Raises:
        Unavailable: the server stayed away.
    """
    headers = {
        "Nats-Schedule": f"@at {at.astimezone(UTC).isoformat().replace('+00:00', 'Z')}",
        "Nats-Schedule-Target": subjects.due(scope, run_id, what),
    }
    await log.store(subjects.timer(scope, run_id, what), b"{}", headers)


def cancel_header(scope: Scope, run_id: str, what: str) -> dict[str, str]:
    """Headers that make an event cancel a timer in the same message."""
    return {"Nats-Scheduler": subjects.timer(scope, run_id, what), "Nats-Schedule-Next": "purge"}
