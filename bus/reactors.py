"""Reactors: durable consumers that turn facts into next facts.

They are at-least-once; the compare-and-set append makes them exactly-once in effect. What is about one entity is worked on in
order; what is about several, side by side.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from functools import partial

import nats.errors

from bus import access, timers, tokens, topology, waits
from bus.continuations import Continuations
from bus.leases import spec_of
from bus.log import RUN, Log
from bus.presence import Presence
from bus.pull import Delivery, Puller, ensure_consumer
from bus.queueing import Gate, enqueue
from bus.reactions import Handler, Reaction
from bus.services.sessions import EXPIRY, Sessions
from bus.shards import sharded
from bus.wakeups import Wakeups
from helmr import subjects
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable
from helmr.reducers import run as rules

log = logging.getLogger(__name__)

_BATCH = 64
_RETRY_DELAY = 1.0


class Reactors:
    """All reactors of one control process."""

    def __init__(
        self, event_log: Log, presence: Presence, gate: Gate, continuations: Continuations, sessions: Sessions
    ) -> None:
        self.log = event_log
        self.presence = presence
        self._gate = gate
        self._sessions = sessions
        self.continuations = continuations
        self.wakeups = Wakeups(event_log, presence, gate, continuations)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Create the consumers and start following them."""
        own = [
            Reaction("due", [subjects.ALL_DUE], self._due),
            Reaction("retry", [subjects.of_kind("run", "retry_scheduled")], self._retry_scheduled),
        ]
        for reaction in (*own, *self.wakeups.reactions(), *self.continuations.reactions()):
            config = topology.reactor_consumer(reaction.name, reaction.filters)
            await ensure_consumer(self.log.nc, reaction.stream, config.as_dict())
            tasks.create_task(self._follow(reaction))

    async def _follow(self, reaction: Reaction) -> None:
        consumer = f"reactor-{reaction.name}"
        while True:
            try:
                async with (
                    sharded(partial(self._handle, handler=reaction.handler)) as shards,
                    Puller(self.log.nc, reaction.stream, consumer) as puller,
                ):
                    while True:
                        async for item in puller.pull(_BATCH):
                            await shards.put(subjects.about(item.msg.subject), item)
            except* (HelmrError, nats.errors.Error) as group:
                log.info("%s: starting over: %s", consumer, group.exceptions[0])
                await asyncio.sleep(_RETRY_DELAY)  # the server is away

    async def _handle(self, item: Delivery, handler: Handler) -> None:
        try:
            await handler(item)
        except (Unavailable, nats.errors.Error):
            raise
        except (Conflict, NotFound) as error:
            log.debug("moot: %s", error)  # somebody else drew the consequence, or the entity is gone
        except Exception:  # a message that nobody understands must not keep us from all others
            log.exception("%s: cannot make anything of it", item.msg.subject)
        await item.msg.ack()

    async def _due(self, item: Delivery) -> None:
        """A timer fired: a queued run, a session or a token of either kind expires, an attempt begins, or a wait is over."""
        scope, run_id, what = subjects.parse_due(item.msg.subject)
        if what == "ttl":
            ttl = spec_of(await self.log.first(RUN, scope, run_id)).ttl or 0.0
            await self.log.transact(RUN, scope, run_id, lambda state: rules.expire(state, ttl=ttl))
        elif what == "retry":
            await enqueue(self.log, scope, run_id, cause="retry", alive=set(self.presence.alive()), gate=self._gate)
        elif what == waits.TIMER:
            await self.wakeups.due(scope, run_id)
        elif what == EXPIRY:
            await self._sessions.expire(scope, run_id)
        elif what == tokens.TIMER:
            await tokens.expire(self.log, scope, run_id)
        elif what == access.TIMER:
            await access.expire(self.log, scope, run_id)

    async def _retry_scheduled(self, item: Delivery) -> None:
        """Arm the timer of a retry; whoever appended the event may have died before doing so."""
        event = RUN.decode(item.msg.data)
        scope = subjects.parse_event(item.msg.subject).scope
        await timers.arm(self.log, scope, event.run_id, "retry", datetime.fromisoformat(event.data["at"]))
