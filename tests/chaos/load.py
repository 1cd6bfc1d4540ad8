"""What users do meanwhile: runs of every kind, started, repeated and cancelled at random, and a note of what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec

from helmr import ids
from helmr.client import AsyncClient
from helmr.client.sessions import Started
from helmr.errors import Conflict, HelmrError, NotFound, TimedOut, Unavailable
from helmr.reducers.queue import limits
from tests.chaos.evidence import Answer, Start

log = logging.getLogger(__name__)

Random = random.Random
#: Starts under way at the same time; beyond that the users wait.
_AT_ONCE = 24
#: Runs that have not ended beyond which users start none, and seconds between two looks: a slow machine is tried, not buried.
_OPEN, _LOOK = 100, 1.0
#: Seconds that a token can be completed.
_TOKEN_TIME = 8.0
#: How many of the latest workspaces and external ids may be used again.
_RECENT = 12


#: The queues of the project, and what they allow.
LIMITS = {"narrow": limits(1, None), "wide": limits(4, 2)}


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of run: its task, how often it is started, its payload, and the ends that are right for it."""

    task: str
    weight: int
    outcomes: frozenset[str] = frozenset({"succeeded"})
    midway: frozenset[str] = frozenset()
    payload: Callable[[Random], dict[str, Any]] = lambda _: {}
    #: Starts at a time.
    burst: int = 1
    #: Options of the start.
    options: Callable[[Random], dict[str, Any]] = lambda _: {}


def _seconds(low: float, high: float) -> Callable[[Random], dict[str, Any]]:
    return lambda rng: {"seconds": round(rng.uniform(low, high), 2)}


def _lines(low: int, high: int, width: int) -> Callable[[Random], dict[str, Any]]:
    return lambda rng: {"lines": rng.randint(low, high), "width": width, "pause": rng.choice([0.0, 0.01, 0.05])}


def _limited(rng: Random) -> dict[str, Any]:
    return {"concurrency_key": rng.choice([None, None, "a", "b"]), "priority": rng.randint(0, 9)}


KINDS: tuple[Kind, ...] = (
    Kind(task="noop", weight=6),
    Kind(
        task="typed",
        weight=2,
        payload=lambda rng: {"items": [str(n) for n in range(rng.randint(0, 9))], "note": "größer"},
    ),
    Kind(task="prints", weight=4, payload=_lines(1, 400, 60)),
    Kind(task="prints", weight=1, payload=_lines(2000, 6000, 400)),
    Kind(task="sleeps", weight=4, payload=_seconds(0, 5)),
    Kind(task="sleeps-async", weight=2, payload=_seconds(0, 5)),
    Kind(task="fails", weight=2, outcomes=frozenset({"task_error"})),
    Kind(
        task="retries",
        weight=2,
        midway=frozenset({"task_error"}),
        payload=lambda rng: {"succeeds_at": rng.randint(1, 3)},
    ),
    Kind(
        task="ends-by-signal",
        weight=2,
        outcomes=frozenset({"task_exit"}),
        payload=lambda rng: {"signal": rng.choice(["SIGSEGV", "SIGKILL", "SIGUSR1"])},
    ),
    Kind(task="stubborn", weight=1, outcomes=frozenset({"succeeded", "max_duration"}), payload=_seconds(0.5, 4)),
    Kind(task="leaves-daemon", weight=2, payload=_seconds(0, 1)),
    Kind(task="keeps-records", weight=2, payload=lambda rng: {"records": rng.randint(1, 30), "pause": 0.02}),
    Kind(task="once", weight=2, outcomes=frozenset({"succeeded", "worker_lost"}), payload=_seconds(0, 3)),
    Kind(task="waits-for-input", weight=4, payload=lambda rng: {"timeout": rng.choice([3, 6])}),
    Kind(task="waits-for-token", weight=3),
    Kind(task="sleeps-durably", weight=3, payload=_seconds(0.1, 2)),
    Kind(task="narrow", weight=1, burst=5, payload=_seconds(0, 0.3), options=_limited),
    Kind(
        task="wide",
        weight=2,
        midway=frozenset({"task_error"}),
        burst=6,
        payload=lambda rng: {"seconds": round(rng.uniform(0, 2), 2), "fails": rng.random() < 0.3},
        options=_limited,
    ),
    Kind(task="noop", weight=2, options=lambda rng: {"ttl": rng.choice([1.0, 3.0, 600.0])}),
)


class Load:
    """The users; :meth:`run` is what they do, and the rest what they remember."""

    def __init__(self, client: AsyncClient, rng: Random, metadata: dict[str, Any], *, every: float) -> None:
        self._client = client
        self._rng = rng
        self._metadata = metadata
        self._every = every
        self.starts: list[Start] = []
        self.answers: list[Answer] = []
        self.cancels: set[str] = set()
        #: Requests that failed, by the name of the error.
        self.failures: dict[str, int] = {}
        #: Requests that failed as no request may.
        self.surprises: list[str] = []
        self._room = asyncio.Event()
        self._room.set()
        self._workspaces: list[str] = []
        self._repeatable: list[tuple[Kind, int, dict[str, Any], dict[str, Any]]] = []

    async def run(self, seconds: float) -> None:
        """Start, repeat and cancel for so long; returns when every answer is there."""
        end = asyncio.get_running_loop().time() + seconds
        limit = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            number = 0
            watching = tasks.create_task(self._watch())
            while asyncio.get_running_loop().time() < end:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end):
                        await self._room.wait()
                await limit.acquire()
                task = tasks.create_task(self._one(number))
                task.add_done_callback(lambda _: limit.release())
                number += 1
                await asyncio.sleep(self._rng.expovariate(1 / self._every))
            watching.cancel()

    async def _watch(self) -> None:
        """Find out again and again whether there is room for more runs; while nobody answers it is as it was."""
        while True:
            await asyncio.sleep(_LOOK)
            control = (await self._client.status())["control"]
            if control is not None:
                unfinished = sum(control["runs"].values())
                change = self._room.set if unfinished < _OPEN else self._room.clear
                change()

    async def _one(self, number: int) -> None:
        if self._repeatable and self._rng.random() < 0.1:
            kind, n, payload, options = self._rng.choice(self._repeatable)
        else:
            kind = self._rng.choices(KINDS, [kind.weight for kind in KINDS])[0]
            n, payload = number, kind.payload(self._rng) | {"n": number}
            options = kind.options(self._rng) | self._common()
        if kind.task == "waits-for-token" and "token" not in payload:
            try:
                payload["token"] = (await self._client.tokens.create(timeout=_TOKEN_TIME)).token.id
            except (TimedOut, Unavailable) as error:
                self._failed(error)
                return
            except HelmrError as error:
                self.surprises.append(f"creation of a token: {type(error).__name__}: {error.message}")
                return
        copies = 2 if "external_id" in options and self._rng.random() < 0.5 else kind.burst
        fate = self._rng.random(), self._rng.uniform(0, 3), self._rng.random() < 0.3
        await asyncio.gather(*(self._start(kind, n, payload, options, fate) for _ in range(copies)))

    def _common(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self._rng.random() < 0.2:
            options["external_id"] = ids.new("req")
        if self._workspaces and self._rng.random() < 0.5:
            options["workspace"] = self._rng.choice(self._workspaces)
        return options

    async def _start(
        self,
        kind: Kind,
        n: int,
        payload: dict[str, Any],
        options: dict[str, Any],
        fate: tuple[float, float, bool],
    ) -> None:
        try:
            started = await self._client.sessions.start(kind.task, payload, metadata=self._metadata, **options)
        except (TimedOut, Unavailable) as error:
            self._failed(error)
            return
        except HelmrError as error:
            self.surprises.append(f"start of {kind.task}: {type(error).__name__}: {error.message}")
            return
        self._remember(kind, n, payload, options, started)
        chance, delay, force = fate
        if kind.task == "waits-for-input" and chance > 0.3:
            await asyncio.sleep(delay)
            await self._answer(started)
        if kind.task == "waits-for-token" and chance > 0.2:
            await asyncio.sleep(delay)
            await asyncio.gather(*(self._complete(payload["token"], ids.new("req")) for _ in range(2)))
        if chance < 0.15:
            await asyncio.sleep(delay)
            await self._cancel(started, force=force, session=chance < 0.03)

    def _remember(self, kind: Kind, n: int, payload: dict[str, Any], options: dict[str, Any], started: Started) -> None:
        self.starts.append(
            Start(
                run_id=started.run.id,
                session_id=started.session.id,
                kind=kind.task,
                n=n,
                outcomes=kind.outcomes,
                midway=kind.midway,
                external_id=options.get("external_id"),
                reused=started.reused,
                ttl=options.get("ttl"),
                width=payload.get("width", 40),
            )
        )
        self._workspaces = [*self._workspaces[-_RECENT:], started.session.workspace_id]
        if "external_id" in options:
            self._repeatable = [*self._repeatable[-_RECENT:], (kind, n, payload, options)]

    async def _answer(self, started: Started) -> None:
        answers = self._client.sessions.open(started.session).input("answers")
        try:
            await answers.send({"answer": 42}, idempotency_key=ids.new("req"))
        except Conflict:
            return  # the session was cancelled
        except (TimedOut, Unavailable) as error:
            self._failed(error)

    async def _complete(self, token: str, data: str) -> None:
        try:
            await self._client.tokens.complete(token, data)
        except Conflict:
            return  # somebody else was first, or it is too late
        except (TimedOut, Unavailable) as error:
            self._failed(error)
        else:
            self.answers.append(Answer(token=token, data=data))

    async def _cancel(self, started: Started, *, force: bool, session: bool) -> None:
        self.cancels.add(started.run.id)
        try:
            if session:
                await self._client.sessions.cancel(started.session)
            else:
                await self._client.runs.cancel(started.run, force=force, reason="changed our mind")
        except Conflict:
            return  # it has ended by itself
        except NotFound as error:
            self.surprises.append(f"cancel of {started.run.id}, which was started: {error.message}")
        except (TimedOut, Unavailable) as error:
            self._failed(error)

    def _failed(self, error: HelmrError) -> None:
        name = type(error).__name__
        self.failures[name] = self.failures.get(name, 0) + 1
