"""What is said of a run when its execution here has ended: its log is stored, then one event says what came of it."""

from __future__ import annotations

import logging

from bus import waits
from helmr import chunks, events
from helmr.errors import Unavailable
from helmr.events import Draft, RunSpec, RunState
from helmr.reducers import run as rules
from helmr.subjects import Scope
from worker import large_values
from worker.conversation import Conversation
from worker.log_pump import LogPump
from worker.outcome import Cancelled, Failed, Lost, Outcome, Succeeded, Waits
from worker.run_journal import RunJournal
from worker.services import Services

log = logging.getLogger(__name__)


class Conclusion:
    """Appends the end of one execution under its lease."""

    def __init__(
        self,
        services: Services,
        scope: Scope,
        spec: RunSpec,
        *,
        journal: RunJournal,
        pump: LogPump,
        conversation: Conversation,
    ) -> None:
        self._services = services
        self._scope = scope
        self._spec = spec
        self._journal = journal
        self._pump = pump
        self._conversation = conversation
        #: Whether the lease was given up and the run must be queued again.
        self.handed_back = False

    async def conclude(self, outcome: Outcome) -> None:
        """Have the run end, be tried again, or be given back, as its outcome demands; one that waits needs no more than a look.

        Raises:
            Fenced: the lease is lost.
        """
        if isinstance(outcome, Waits):
            await self._look_for_answer()
            return
        await self._store_logs(chunks.WORKER_LOST if isinstance(outcome, Lost) else None)
        logs = self._pump.totals
        match outcome:
            case Succeeded():
                data = await large_values.told(self._services.values, outcome.output) | {"exit_code": 0, "logs": logs}
                draft = Draft(kind="succeeded", data=data, message="succeeded", source="worker")
                await self._journal.append(lambda _: draft)
            case Cancelled():
                await self._journal.append(lambda s: rules.cancelled(_reason(s), source="worker", logs=logs))
            case Lost():
                await self.hand_back(outcome.reason, orderly=outcome.orderly)
            case Failed():
                failure, code = outcome.failure, outcome.exit_code
                at = events.now()
                await self._journal.append(
                    lambda s: rules.end_attempt(s, self._spec, failure, at=at, exit_code=code, logs=logs)
                )

    async def stop(self, reason: str) -> None:
        """Give the run back in good order, its log as it is.

        Raises:
            Fenced: the lease is lost.
        """
        await self._store_logs(chunks.WORKER_LOST)
        await self.hand_back(reason, orderly=True)

    async def hand_back(self, reason: str, *, orderly: bool = False) -> None:
        """Give the lease up; the worker has the run queued again, when it is ready for that.

        Raises:
            Fenced: the lease is lost.
        """
        at = events.now()
        state = await self._journal.append(
            lambda state: rules.abandon(
                state, self._spec, reason=reason, began=self._conversation.began, at=at, orderly=orderly
            )
        )
        self.handed_back = state.status == "queued"

    async def _look_for_answer(self) -> None:
        """What the run waits for may have come before it waited. The run is not ours any more, and control looks, too."""
        run_id = self._journal.state.id
        try:
            await waits.settle(self._services.log, self._scope, run_id)
        except Unavailable as error:
            log.info("run %s waits; whether that is over is for control to find out: %s", run_id, error)

    async def _store_logs(self, tombstone: str | None) -> None:
        """Have everything written stored before the event that ends the attempt says so."""
        if tombstone:
            self._pump.tombstone(tombstone)
        await self._journal.flush()
        await self._pump.drain()


def _reason(state: RunState) -> str | None:
    return state.cancel.reason if state.cancel else None
