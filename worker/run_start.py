"""The process of an execution: the one that was kept while its run waited, or was left by a dead worker, or else a new one."""

from __future__ import annotations

import asyncio
from typing import Any

from bus import bookmark
from bus.bookmark import Bookmark, Torn
from helmr.errors import Conflict
from helmr.events import RunSpec
from helmr.reducers.journal import Recorded
from helmr.subjects import Scope
from worker.conversation import Conversation
from worker.engine import Machine, Process
from worker.hot import HotRun, discard
from worker.machine_maker import Needs
from worker.preparation import Preparation
from worker.run_journal import Fenced, RunJournal
from worker.services import Services
from worker.task_process import task_process


class RunStart:
    """Begins, or goes on with, what one lease allows to be executed."""

    def __init__(
        self,
        services: Services,
        scope: Scope,
        spec: RunSpec,
        *,
        journal: RunJournal,
        conversation: Conversation,
        preparation: Preparation,
    ) -> None:
        self._services = services
        self._scope = scope
        self._spec = spec
        self._journal = journal
        self._conversation = conversation
        self._preparation = preparation

    async def start(
        self, machine: Machine, needs: Needs, task: dict[str, Any], *, hot: HotRun | None, deadline: float
    ) -> Process:
        """The process that was kept (``hot``), told the answer; or a new one, which knows what is recorded.

        Raises:
            BrokenOff: a cancel or the deadline came first.
            Fenced: the lease is lost.
            Torn: the process that was left cannot go on, because nobody can tell how far it had got.
            Unavailable: the machine is gone.
        """
        try:
            await self._journal.confirm()
        except Fenced:
            if hot is not None:
                await discard(hot.process)
            raise
        left = max(deadline - asyncio.get_running_loop().time(), 0.1)
        if hot is not None:
            if await self._go_on(hot, left):
                return hot.process
            await self._preparation.fetch_payload(deadline)  # it was not to be needed
        return await machine.start(
            task_process(
                self._journal.state.id,
                self._spec,
                self._journal.state,
                deployment=needs.deployment,
                module=task["module"],
                preload=tuple(needs.sandbox.get("preload", ())),
                payload=self._preparation.payload,
                recorded=await self._recorded(),
                secrets=self._preparation.secrets,
                deadline=left,
            )
        )

    async def _go_on(self, hot: HotRun, left: float) -> bool:
        """Tell a process that was kept what came of its wait; whether it lives to hear it."""
        try:
            await hot.process.limit(left, self._spec.cancel_grace)
            if hot.question:
                await self._conversation.answers.tell(hot.process, hot.question)
            else:
                self._conversation.bookmark = await self._find_bookmark(hot)
                self._conversation.began = self._conversation.bookmark.began
        except Conflict:
            await discard(hot.process)
            return False
        except BaseException:
            await asyncio.shield(discard(hot.process))
            raise
        return True

    async def _find_bookmark(self, hot: HotRun) -> Bookmark:
        """Where the dead worker got to whose process this is."""
        log, state = self._services.log, self._journal.state
        attempt, dispatch = state.attempt or 1, state.dispatch_attempt
        if hot.dispatches + 1 != dispatch:
            raise Torn("it was executed elsewhere meanwhile")
        await bookmark.silence(log.nc, hot.former)
        return await bookmark.find(
            log.js, self._scope, state.id, execution=hot.execution, attempt=attempt, dispatch=dispatch
        )

    async def _recorded(self) -> Recorded:
        """What is recorded of earlier executions."""
        if not self._journal.executed_before:
            return Recorded(entries=[])
        return await self._conversation.answers.recorded()
