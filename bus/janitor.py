"""Deletes from the log what has ended long ago and is safe in the history: by entity, message by message.

The ends of runs, sessions, workspaces, tokens and access tokens are followed by one durable consumer, in the order of the log,
which is that of time: where it stands is all there is to remember, and any number of control processes share it. An end that
is too young, not yet in the history, or still of use is put back until it is due. The message of the end is deleted last, so
that whoever dies in between leaves an entity that has ended, and the end is delivered again.

The latest run of a session keeps its first and its last message for as long as the session is there: an open session may go on
from it, and an external id leads to it.

Messages are deleted by sequence, never purged by subject: with consumers about, a purge halts the stream for up to 40 ms.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import nats.errors
import nats.js.errors

from bus import topology, watermark
from bus.log import RUN, SESSION, TOKEN, Log
from bus.pull import Delivery, Puller, ensure_consumer
from bus.requests import api
from bus.stored import get_message
from bus.watermark import Watermark
from helmr import subjects
from helmr.errors import HelmrError
from helmr.events import TERMINAL
from helmr.subjects import Entity, EventSubject, Scope

log = logging.getLogger(__name__)

#: What each kind of entity ends with.
_ENDS: dict[Entity, tuple[str, ...]] = {
    "run": tuple(sorted(TERMINAL)),
    "session": ("closed", "cancelled", "expired"),
    "workspace": ("deleted",),
    "token": ("completed", "cancelled", "expired"),
    "access": ("revoked", "expired"),
    "exec": ("exited", "failed", "lost"),
}
#: Seconds that an ended entity stays, unless told otherwise.
RETENTION = 7 * 86_400.0
#: Seconds until what is not in the history yet, or of use, is looked at again.
_LOOK_AGAIN = 60.0
#: Seconds between deletions, which take a quarter of that: the rest is for those who work.
_BREATH = 0.001
_BATCH = 64
_RETRY_DELAY = 5.0


class _NotYet(Exception):
    """The entity is still of use."""


class Janitor:
    """The janitor of one control process; run :meth:`run` in a task of its own. ``retention`` in seconds."""

    def __init__(self, event_log: Log, *, retention: float = RETENTION) -> None:
        self.log = event_log
        self.nc = event_log.nc
        self._retention = timedelta(seconds=retention)
        self._clear: dict[str, Callable[[EventSubject, Watermark], Awaitable[None]]] = {
            "run": self._clear_run,
            "session": self._clear_session,
            "workspace": self._clear_workspace,
            "token": self._clear_token,
            "access": self._clear_access,
            "exec": self._clear_exec,
        }

    async def run(self) -> None:
        """Tidy up for ever."""
        filters = [subjects.of_kind(entity, kind) for entity, kinds in _ENDS.items() for kind in kinds]
        config = topology.janitor_consumer(filters)
        while True:
            try:
                await ensure_consumer(self.nc, topology.RUNS, config.as_dict())
                async with Puller(self.nc, topology.RUNS, str(config.durable_name)) as puller:
                    while True:
                        async for item in puller.pull(_BATCH):
                            await self._consider(item)
            except (HelmrError, nats.errors.Error, nats.js.errors.Error) as error:
                log.info("janitor: starting over: %s", error)
                await asyncio.sleep(_RETRY_DELAY)  # the server is away

    async def _consider(self, item: Delivery) -> None:
        """Clear away the entity whose end this is, or have its turn come later."""
        age = datetime.now(UTC) - item.msg.metadata.timestamp
        if age < self._retention:
            await item.msg.nak(delay=(self._retention - age).total_seconds())
            return
        ended = subjects.parse_event(item.msg.subject)
        filed = await watermark.read(self.nc)
        if filed is None or not filed.covers(topology.RUNS, item.stream_seq):
            await item.msg.nak(delay=_LOOK_AGAIN)
            return
        try:
            await self._clear[ended.entity](ended, filed)
        except _NotYet:
            await item.msg.nak(delay=_LOOK_AGAIN)
        else:
            await item.msg.ack()

    async def _clear_run(self, ended: EventSubject, _filed: Watermark) -> None:
        run = await self.log.last(RUN, ended.scope, ended.id)
        if run.event is None:
            return
        session = await self.log.last(SESSION, ended.scope, run.state.session_id)
        is_latest = session.event is not None and session.state.run_id == ended.id
        await self._delete(topology.RUNS, subjects.all_due(ended.scope, ended.id))
        await self._delete(topology.RUNS, subjects.history(ended.scope, "run", ended.id), keep_ends=is_latest)

    async def _clear_session(self, ended: EventSubject, filed: Watermark) -> None:
        """With the records of its streams, and what was left of its runs."""
        scope = ended.scope
        events = await self.log.events(SESSION, scope, ended.id)
        runs = [str(event.data["run_id"]) for event in events if "run_id" in event.data]
        await self._require_long_gone(scope, runs)
        records = subjects.io(scope, ended.id, "*")
        last = await get_message(self.log.js, topology.SESSIONS, records)
        if last is not None and not filed.covers(topology.SESSIONS, last[0]):
            raise _NotYet
        await self._delete(topology.SESSIONS, records)
        await self._delete(topology.SESSIONS, subjects.all_once(scope, ended.id))
        for run_id in runs:
            await self._delete(topology.RUNS, subjects.history(scope, "run", run_id))
        await self._delete(topology.RUNS, subjects.all_due(scope, ended.id))
        await self._delete(topology.RUNS, subjects.history(scope, "session", ended.id))

    async def _require_long_gone(self, scope: Scope, runs: list[str]) -> None:
        horizon = datetime.now(UTC) - self._retention
        for run_id in runs:
            last = await self.log.last(RUN, scope, run_id)
            if last.event is not None and (last.state.finished_at is None or last.state.finished_at > horizon):
                raise _NotYet

    async def _clear_workspace(self, ended: EventSubject, _filed: Watermark) -> None:
        await self._delete(topology.RUNS, subjects.history(ended.scope, "workspace", ended.id))

    async def _clear_token(self, ended: EventSubject, _filed: Watermark) -> None:
        """Not while the run that made it is alive: it may ask for the answer at any time."""
        token = await self.log.last(TOKEN, ended.scope, ended.id)
        if token.event is not None:
            runs = [run_id for run_id in (token.state.run_id, *token.state.waiters) if run_id]
            await self._require_long_gone(ended.scope, runs)
        await self._delete(topology.RUNS, subjects.all_due(ended.scope, ended.id))
        await self._delete(topology.RUNS, subjects.history(ended.scope, "token", ended.id))

    async def _clear_access(self, ended: EventSubject, _filed: Watermark) -> None:
        await self._delete(topology.RUNS, subjects.all_due(ended.scope, ended.id))
        await self._delete(topology.RUNS, subjects.history(ended.scope, "access", ended.id))

    async def _clear_exec(self, ended: EventSubject, _filed: Watermark) -> None:
        """With what is left of its output."""
        await self._delete(topology.EXECS, subjects.exec_output(ended.scope, ended.id))
        await self._delete(topology.RUNS, subjects.history(ended.scope, "exec", ended.id))

    async def _delete(self, stream: str, subject: str, *, keep_ends: bool = False) -> None:
        """Delete the messages under a filter, oldest first; or all but the first and the last."""
        found: list[int] = []
        while (message := await get_message(self.log.js, stream, subject, after=found[-1] if found else 0)) is not None:
            found.append(message[0])
        for seq in found[1:-1] if keep_ends else found:
            # Not erased: overwriting the bytes would cost more, and says nothing about copies.
            await api(self.nc, f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True})
            await asyncio.sleep(_BREATH)
