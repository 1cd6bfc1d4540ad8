"""Whether a worker takes runs: not before it has begun, while its disk is almost full or its engine away, or once it drains."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from helmr.errors import EngineUnavailable, HelmrError
from worker.engine import Engine
from worker.host import disk_is_full

log = logging.getLogger(__name__)

#: Seconds between looks at an engine that does not answer.
_ENGINE_RETRY = 2.0


class Stopping(Exception):
    """The worker takes nothing any more: somebody else shall."""


class NotNow(Exception):
    """The disk is almost full, or the engine away: somebody else shall, or this worker later."""


class Intake:
    """Knows what speaks against taking runs. Lanes pull while ``gate`` is set."""

    def __init__(self, home: Path, engine: Engine) -> None:
        self._home = home
        self._engine = engine
        self.gate = asyncio.Event()
        self.draining = False
        self.disk_full = False
        self.engine_problem = ""  #: why the engine cannot be used; empty: it can
        self._begun = False
        self._engine_lost = asyncio.Event()

    def begin(self) -> None:
        """Take runs from now on, unless something speaks against it."""
        self._begun = True
        self._open()

    def drain(self) -> None:
        """Take nothing any more."""
        self.draining = True
        self.gate.clear()

    def check(self) -> None:
        """Ask whether a run may be taken that was on its way when the gate was closed.

        Raises:
            Stopping, NotNow: it may not.
        """
        if self.draining:
            raise Stopping
        if self.disk_full or self.engine_problem:
            raise NotNow

    def _open(self) -> None:
        if self._begun and not (self.draining or self.engine_problem or self.disk_full):
            self.gate.set()

    async def mind_disk(self) -> None:
        """Take no runs while the disk is almost full: they would fail, and take those that run along."""
        full = await asyncio.to_thread(disk_is_full, self._home, before=self.disk_full)
        if full != self.disk_full:
            log.warning(
                "the disk of %s %s", self._home, "is almost full: taking nothing new" if full else "has room again"
            )
        self.disk_full = full
        if full:
            self.gate.clear()
        else:
            self._open()

    def lose_engine(self, error: EngineUnavailable) -> None:
        """Take no runs while the engine does not answer: each would only come back at once."""
        if not self.engine_problem:
            log.warning("%s; taking nothing new until it can be used", error)
        self.engine_problem = error.message
        self.gate.clear()
        self._engine_lost.set()

    async def mind_engine(
        self, *, announce: Callable[[], Awaitable[None]], clean_up: Callable[[], Awaitable[None]]
    ) -> None:
        """Say when the engine is away, look every now and then whether it is back, and clean up what had to wait for it."""
        while True:
            await self._engine_lost.wait()
            self._engine_lost.clear()
            await announce()
            while self.engine_problem:
                await asyncio.sleep(_ENGINE_RETRY)  # also the first time: one that answers, and refuses, needs a moment
                await self._try_engine()
            log.warning("the engine can be used again")
            await clean_up()
            self._open()
            await announce()

    async def _try_engine(self) -> None:
        try:
            await self._engine.check()
        except HelmrError as error:
            self.engine_problem = error.message
        else:
            self.engine_problem = ""
