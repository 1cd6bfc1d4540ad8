"""One part of Helmr as the test-bed runs it: the part that users run, signing what it appends, and broken on request.

``python -m tests.chaos.part_process control URL`` is a control process, any other words are those of the ``helmr`` command.
Each event appended under a lease gets a header that names the lease: the fence can only be checked from outside if writers say
who they are. ``HELMR_CHAOS_MUTATION`` names one protection to take away (:data:`MUTATIONS`), to show that its loss is noticed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import worker.leasing
from bus.log import _EXPECT_FILTER, _EXPECT_SEQ, Log
from helmr.errors import Unavailable
from helmr.reducers.queue import Room
from tests.integration import worker_process
from worker.log_pump import LogPump
from worker.run_journal import RunJournal

#: Header of an event: ``<worker>@<cursor of the lease>`` of whoever appended it under a lease.
WRITER = "Chaos-Writer"
MUTATION = "HELMR_CHAOS_MUTATION"
_lease: ContextVar[str | None] = ContextVar("lease", default=None)


def sign() -> None:
    """Have every event that is appended under a lease say so."""
    append, publish = RunJournal._append, Log._publish

    async def signed(self: RunJournal, decide: Any, frame: Any) -> Any:
        token = _lease.set(f"{self._lease.worker}@{self._lease.cursor}")
        try:
            return await append(self, decide, frame)
        finally:
            _lease.reset(token)

    async def publish_signed(self: Log, subject: str, body: bytes, headers: dict[str, str]) -> int:
        writer = _lease.get()
        return await publish(self, subject, body, headers | ({WRITER: writer} if writer else {}))

    RunJournal._append = signed  # type: ignore[method-assign]
    Log._publish = publish_signed  # type: ignore[method-assign]


def keep_all() -> None:
    """Delete nothing from the log: of queues it has only the latest event otherwise, which tells nothing of its past."""

    async def spare(_: Log, __: int) -> None:
        return

    Log.delete = spare  # type: ignore[method-assign, assignment]


def no_fence() -> None:
    """A worker appends whatever others have appended, and does not hear that it lost its lease."""
    publish = Log._publish

    async def unchecked(self: Log, subject: str, body: bytes, headers: dict[str, str]) -> int:
        checks = {} if _lease.get() is None else {_EXPECT_SEQ, _EXPECT_FILTER}
        return await publish(self, subject, body, {k: v for k, v in headers.items() if k not in checks})

    async def deaf(_: RunJournal) -> None:
        return

    Log._publish = unchecked  # type: ignore[method-assign]
    RunJournal.check = deaf  # type: ignore[method-assign, assignment]


def no_ttl_cancel() -> None:
    """A lease leaves the timer of the time to live alone."""
    worker.leasing.cancel_header = lambda *_: {}  # type: ignore[attr-defined]


def lost_chunks() -> None:
    """One log chunk in twenty is taken for stored when it is not."""
    publish, count = LogPump._publish, 0

    async def careless(self: LogPump, chunk: Any) -> int:
        nonlocal count
        count += 1
        return 1 if count % 20 == 0 else await publish(self, chunk)

    LogPump._publish = careless  # type: ignore[method-assign]


def one_too_many() -> None:
    """A queue has one slot more than it says."""
    fits = Room.fits

    def lax(self: Room, key: str | None) -> bool:
        self.take(key, -1)
        try:
            return fits(self, key)
        finally:
            self.take(key)

    Room.fits = lax  # type: ignore[method-assign]


#: What can be broken: name, and how.
MUTATIONS: dict[str, Callable[[], None]] = {
    "fence": no_fence,
    "ttl-cancel": no_ttl_cancel,
    "log-chunks": lost_chunks,
    "admission": one_too_many,
}


def main() -> None:
    """Be the part that the arguments name."""
    sign()
    keep_all()
    if mutation := os.environ.get(MUTATION):
        MUTATIONS[mutation]()
    words = sys.argv[1:]
    if words[0] == "control":
        logging.basicConfig(level=logging.INFO)
        try:
            asyncio.run(worker_process.main(*words))
        except* Unavailable as away:  # as the command does
            print(f"error: {away.exceptions[0]}", file=sys.stderr)  # noqa: T201
            sys.exit(Unavailable.exit_code)
    else:
        from cli.main import main as command

        command()


if __name__ == "__main__":
    main()
