"""Sees to every dispatch message that a worker has taken: leases its run, has it executed, and settles the message.

Only the compare-and-set append of ``leased`` makes a run this worker's; an acknowledgement is a hint to the queue and no
authority.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from bus.leases import spec_of
from bus.log import RUN
from bus.pull import Delivery
from helmr import subjects
from helmr.errors import HelmrError, Unavailable
from helmr.events import RunEvent
from helmr.subjects import Scope
from worker.execution import Execution
from worker.executions import Executions
from worker.heir import Carried
from worker.intake import Intake, NotNow, Stopping
from worker.lanes import Slots
from worker.leasing import LOOK_AGAIN, Held, Stale, take_lease
from worker.liveness import Liveness
from worker.run_journal import Fenced
from worker.services import Services

log = logging.getLogger(__name__)


class Dispatches:
    """The messages that one worker has in hand, and the runs it carries on without one."""

    def __init__(
        self,
        services: Services,
        liveness: Liveness,
        intake: Intake,
        slots: Slots,
        executions: Executions,
        *,
        worker_id: str,
    ) -> None:
        self._services = services
        self._liveness = liveness
        self._intake = intake
        self._slots = slots
        self._executions = executions
        self._worker_id = worker_id
        self._messages: dict[str, Msg] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        #: How many were settled so far, by what came of them.
        self.results: Counter[str] = Counter()

    def take(self, item: Delivery) -> None:
        """See to a message that has just been pulled."""
        self._slots.claim()
        self._see_to(self._handle(item))

    def carry_on(self, carried: Carried) -> None:
        """See a run to its end that another worker has begun."""
        self._see_to(self._carry_on(carried))

    async def keep(self) -> None:
        """Keep the messages in hand from being delivered to others; raises what nats-py raises when the server is away."""
        for msg in list(self._messages.values()):
            await msg.in_progress()

    async def wait_none(self) -> None:
        """Return when everything has been seen to."""
        while self._handlers:
            await asyncio.wait(self._handlers)

    def _see_to(self, handling: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(handling)
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, item: Delivery) -> None:
        """See the run of one dispatch message to its end, and settle the message."""
        self._messages[item.msg.reply] = item.msg
        entered = False
        result = "failed"
        try:
            await self._slots.enter()
            entered = True
            await self._serve(item)
        except Stale:
            result = "stale"
            await item.msg.ack()
        except Held as held:
            result = "held"
            log.info("%s is %s", item.msg.subject, held)
            await item.msg.nak(delay=LOOK_AGAIN)
        except Stopping:
            result = "returned"
            await item.msg.nak()
        except NotNow:
            result = "returned"
            await item.msg.nak(delay=LOOK_AGAIN)
        except Fenced as fenced:  # the message is the new holder's now: our ack would take it away
            result = "fenced"
            log.info("%s: %s", item.msg.subject, fenced)
        except (Unavailable, nats.errors.Error) as error:
            log.warning("%s: %s; it will be delivered again", item.msg.subject, error)
        except Exception:
            log.exception("%s: it will be delivered again", item.msg.subject)
        else:
            result = "executed"
            await item.msg.ack()
        finally:
            self.results[result] += 1
            del self._messages[item.msg.reply]
            self._slots.leave(entered=entered)

    async def _serve(self, item: Delivery) -> None:
        scope = subjects.parse_event(item.msg.subject).scope
        try:
            dispatched = RUN.decode(item.msg.data)
        except msgspec.DecodeError as error:
            log.warning("%s holds no event: %s", item.msg.subject, error)
            raise Stale from error
        self._intake.check()
        if item.delivered > 1 or dispatched.state.dispatch_attempt > 0:
            await self._lease_and_execute(scope, item, dispatched)
            return
        # Nobody has had this run yet: there is hardly a doubt that the lease will be ours, and the workspace be needed.
        async with self._services.machines.foreseen(scope, dispatched.state.workspace_id):
            await self._lease_and_execute(scope, item, dispatched)

    async def _lease_and_execute(self, scope: Scope, item: Delivery, dispatched: RunEvent) -> None:
        services, run_id = self._services, dispatched.run_id
        kept = services.hot.execution(run_id)
        position = await take_lease(
            services.log, self._liveness, scope, item, dispatched, worker=self._worker_id, execution=kept
        )
        # Only the first dispatch of a run carries what it was started with; the log keeps it for the others.
        spec = services.hot.spec(run_id)
        if spec is None:
            spec = spec_of(dispatched if "spec" in dispatched.data else await services.log.first(RUN, scope, run_id))
        await self._executions.end_former(run_id)
        await self._executions.execute(Execution(services, scope, position, spec), dispatched.cursor)

    async def _carry_on(self, carried: Carried) -> None:
        """There is no message of such a run: it was the other worker's."""
        self._slots.occupy()
        result = "failed"
        try:
            execution = Execution(self._services, carried.scope, carried.position, carried.run.spec, left=carried.run)
            await self._executions.execute(execution, execution.state.dispatch)
        except Fenced as fenced:
            result = "fenced"
            log.info("%s", fenced)
        except (HelmrError, nats.errors.Error) as error:
            log.warning("run %s: %s; control queues it again", carried.run.run_id, error)
        except Exception:
            log.exception("run %s: control queues it again when this worker is gone", carried.run.run_id)
        else:
            result = "executed"
        finally:
            self.results[result] += 1
            self._slots.leave(entered=True)
