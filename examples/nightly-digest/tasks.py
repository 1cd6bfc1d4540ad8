"""A digest of notes, night after night: timers that cost nothing, and steps that are executed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helmr
from helmr import logger, metadata, step, streams, task, timers


@dataclass
class Plan:
    """How often, and how long to sleep in between."""

    nights: int = 3
    pause: str = "1d"


notes = streams.input("notes")
digests = streams.output("digests")


@task("nightly-digest", max_duration="5m", park_after="10s")
def nightly_digest(payload: Plan) -> dict[str, Any]:
    """Sleep, gather what was noted since, write a digest; so many times."""
    began = helmr.now()
    total = 0
    for night in range(1, payload.nights + 1):
        timers.sleep(payload.pause)
        found = []
        while (note := notes.once()) is not None:
            found.append(str(note))
        digest = step("summarise", summarise, night, found)
        digests.append(digest)
        total += digest["notes"]
        metadata.set("night", night)
        logger.info("digest written", night=night, notes=digest["notes"])
    return {"since": began.isoformat(), "nights": payload.nights, "notes": total}


def summarise(night: int, found: list[str]) -> dict[str, Any]:
    """One digest. A model could write it: it would be asked once."""
    longest = max(found, key=len, default="")
    return {"night": night, "notes": len(found), "words": sum(len(note.split()) for note in found), "longest": longest}
