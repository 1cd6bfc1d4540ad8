"""Finishes starts that were interrupted: a session was opened, control died, and no client came back to ask again.

A start is up to three appends (session, workspace, run), and the first says all that is needed for the others. Their ids stand
in it, so that it does not matter how often, or by how many, a start is finished: there is never a second run.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

import nats.errors

from bus.live import HalfStart, LiveRuns
from bus.log import RUN, SESSION, Log
from bus.services.sessions import Sessions
from helmr import events
from helmr.errors import Conflict, HelmrError, NotFound

log = logging.getLogger(__name__)

#: Seconds that whoever opened a session has for the rest.
PATIENCE = 5.0
#: Beyond this age nothing is finished: the run may have lived, ended, and been removed.
TOO_OLD = timedelta(days=1)
_LOOK = 1.0


class HalfStarts:
    """Looks after half-done starts; run :meth:`run` in a task of its own."""

    def __init__(self, event_log: Log, live: LiveRuns, sessions: Sessions, *, patience: float = PATIENCE) -> None:
        self.log = event_log
        self.live = live
        self.sessions = sessions
        self._patience = timedelta(seconds=patience)

    async def run(self, live_ready: asyncio.Event) -> None:
        """Finish them for ever, from when the live runs are known. They are a matter of time passing, so this is a sweep."""
        await live_ready.wait()
        while True:
            await asyncio.sleep(_LOOK)
            try:
                for half in self._due():
                    await self._finish(half)
                    self.live.half_starts.pop(half.run_id, None)
            except (HelmrError, nats.errors.Error) as error:
                log.info("half-done starts: looking again: %s", error)

    def _due(self) -> list[HalfStart]:
        horizon = events.now() - self._patience
        return [half for half in self.live.half_starts.values() if half.at < horizon]

    async def _finish(self, half: HalfStart) -> None:
        run = await self.log.last(RUN, half.scope, half.run_id)
        opened = await self.log.last(SESSION, half.scope, half.session_id)
        if run.event is not None or opened.event is None or opened.event.kind != "opened":
            return  # it was finished, or cancelled before there was anything to cancel
        if half.at < events.now() - TOO_OLD:
            log.warning("session %s was opened at %s, and has no run", half.session_id, half.at)
            return
        log.info("session %s: making run %s, which its start did not come to", half.session_id, half.run_id)
        try:
            await self.sessions.complete(half.scope, opened.event)
        except (Conflict, NotFound) as error:
            log.warning("session %s will have no run: %s", half.session_id, error)
