"""The life of a queue: which runs have a slot of it, and how many may.

A slot is given for one ``held`` event of a run, and by an append to the queue alone: that is what makes a limit exact, however
many control processes there are. Giving it up names that event, too, so that word of an earlier life of the run cannot take
from it a slot that it was given since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict
from helmr.events import Draft, Grant, QueueState

#: Runs that have a slot of one queue at the same time, whatever its limits: all of them stand in each of its events.
MAX_HOLDERS = 1000


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many runs may have a slot: of the whole queue, of each concurrency key, of those without a key. None: no limit."""

    total: int | None = None
    per_key: int | None = None
    keyless: int | None = None

    def of(self, key: str | None) -> int | None:
        """The limit of the runs that share ``key``, or that have none."""
        return self.keyless if key is None else self.per_key

    def bind(self, key: str | None) -> bool:
        """Whether a run with this key needs a slot at all."""
        return self.total is not None or self.of(key) is not None


def limits(concurrency: int | None, concurrency_per_key: int | None) -> Limits:
    """What a queue's declaration means.

    ``concurrency`` alone limits the runs of each concurrency key, and those without a key together. With
    ``concurrency_per_key`` that one limits each key, and ``concurrency`` all of them together.
    """
    if concurrency_per_key is None:
        return Limits(per_key=concurrency, keyless=concurrency)
    return Limits(total=concurrency, per_key=concurrency_per_key)


class Room:
    """The free slots of a queue, taken one by one; ``others`` are keys of runs that execute without a grant.

    There are such runs when a deployment has just introduced the limit: they count until they end.
    """

    def __init__(self, state: QueueState | None, bounds: Limits, *, others: Iterable[str | None] = ()) -> None:
        self._bounds = bounds
        self._used = Counter(grant.key for grant in state.holders.values()) if state else Counter[str | None]()
        self._granted = self._used.total()
        self._used.update(others)
        self._total = self._used.total()

    def fits(self, key: str | None) -> bool:
        """Whether one more run with this key may be admitted."""
        total, own = self._bounds.total, self._bounds.of(key)
        return (
            self._granted < MAX_HOLDERS
            and (total is None or self._total < total)
            and (own is None or self._used[key] < own)
        )

    def take(self, key: str | None, slots: int = 1) -> None:
        """Admit one; or with -1 slots, release one."""
        self._used[key] += slots
        self._granted += slots
        self._total += slots


def apply(state: QueueState | None, kind: str, data: dict[str, Any], at: datetime, *, queue_id: str = "") -> QueueState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow.
    """
    if kind not in {"admitted", "released"}:
        raise Conflict(f"queue {queue_id}: {kind} cannot follow")
    before = state or QueueState(id=queue_id, cursor=0, updated_at=at)
    holders = dict(before.holders)
    for run_id in data.get("released", ()):
        holders.pop(run_id, None)
    for run_id, grant in data.get("admitted", {}).items():
        holders[run_id] = msgspec.convert({**grant, "at": at}, Grant)
    return QueueState(id=before.id, cursor=before.cursor + 1, holders=holders, updated_at=at)


Wanted = Mapping[str, Grant]


def change(
    state: QueueState | None,
    bounds: Limits,
    *,
    admit: Wanted,
    release: Mapping[str, int],
    others: Iterable[str | None] = (),
) -> Draft | None:
    """Give slots to the runs ``admit``, and take back those of ``release`` (run id and the ``held`` event of the grant).

    What has been given or taken already is left out; None when nothing is left.

    Raises:
        Conflict: a limit would be exceeded.
    """
    holders = state.holders if state else {}
    gone = {run_id: held for run_id, held in release.items() if run_id in holders and holders[run_id].held == held}
    new = {run_id: grant for run_id, grant in admit.items() if not _older(grant, holders.get(run_id))}
    room = Room(state, bounds, others=others)
    for run_id in gone:
        room.take(holders[run_id].key, -1)
    for run_id, grant in new.items():
        if run_id in holders and run_id not in gone:  # it left and is back before anybody noticed: it keeps its slot
            room.take(holders[run_id].key, -1)
        if not room.fits(grant.key):
            raise Conflict(f"the limit of the queue is reached, run {run_id} must wait")
        room.take(grant.key)
    return _draft(new, gone)


def _older(grant: Grant, present: Grant | None) -> bool:
    return present is not None and grant.held <= present.held


def _draft(new: dict[str, Grant], gone: dict[str, int]) -> Draft | None:
    if not new and not gone:
        return None
    admitted = {run_id: _told(grant) for run_id, grant in new.items()}
    words = [f"{len(admitted)} admitted"] * bool(admitted) + [f"{len(gone)} released"] * bool(gone)
    return Draft(
        kind="admitted" if admitted else "released",
        data={"admitted": admitted, "released": gone},
        message=", ".join(words),
    )


def _told(grant: Grant) -> dict[str, Any]:
    told: dict[str, Any] = {"held": grant.held, "seq": grant.seq}
    return told if grant.key is None else told | {"key": grant.key}


def left(state: QueueState, gone: Callable[[str, Grant], bool]) -> dict[str, int]:
    """The grants that their runs have given up, as ``gone`` says, for :func:`change` to release."""
    return {run_id: grant.held for run_id, grant in state.holders.items() if gone(run_id, grant)}
