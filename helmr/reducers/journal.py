"""What of a run's events counts when its code is executed again: the entries of the journal, in their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from helmr.events import RunEvent

_OUTCOMES = {"wait_completed": "completed", "wait_timed_out": "timed_out", "wait_cancelled": "cancelled"}

_OF_STEPS = frozenset({"result", "error", "metadata", "found"})


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """The journal of a run; ``entries`` are what :class:`helmr.replay.Journal` takes."""

    entries: list[dict[str, Any]]
    metadata_calls: int = 0


def recorded(events: Iterable[RunEvent], *, attempt: int) -> Recorded:
    """The journal, as the execution of ``attempt`` is to see it.

    What an earlier attempt failed with in the end is left out (a failed step, a wait that timed out): it is what the new
    attempt is for.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    calls = 0
    waits: dict[str, Any] | None = None
    for event in events:
        data, made = event.data, event.attempt or 1
        match event.kind:
            case "step":
                kept = {key: value for key, value in data.items() if key in _OF_STEPS}
                found.append((made, {"kind": data["call"], **_key(data), **kept}))
            case "output" if data.get("n") is not None:
                found.append((made, {"kind": "output", **_key(data), "name": data["stream"]}))
            case "token_created":
                made_token = {"token": data["token"], "expires_at": data["expires_at"]}
                found.append((made, {"kind": "token", **_key(data), **made_token}))
            case "metadata":
                calls = max(calls, data.get("n") or 0)
            case "waiting":
                waits = {"kind": "wait", **_key(data)}
            case "wait_completed" | "wait_timed_out" | "wait_cancelled" if waits is not None:
                found.append((made, waits | outcome(event)))
                waits = None
            case _:
                continue
    return Recorded(entries=_without_last_failure(found, attempt), metadata_calls=calls)


def outcome(event: RunEvent) -> dict[str, Any]:
    """What the task is told about a wait, from the event that ended it."""
    data = event.data
    return {"outcome": _OUTCOMES[event.kind], "data": data.get("data"), "reason": data.get("reason")}


def _key(data: dict[str, Any]) -> dict[str, Any]:
    return {"name": data.get("name", ""), "n": data.get("n", 1), "main": data.get("main", True)}


def _without_last_failure(found: list[tuple[int, dict[str, Any]]], attempt: int) -> list[dict[str, Any]]:
    last = max((at for at, (_, entry) in enumerate(found) if entry["main"]), default=-1)
    return [
        entry
        for at, (made, entry) in enumerate(found)
        if made == attempt or not _failed(entry) or (entry["main"] and at != last)
    ]


def _failed(entry: dict[str, Any]) -> bool:
    return "error" in entry or entry.get("outcome", "completed") != "completed"
