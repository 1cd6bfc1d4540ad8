"""What a run of the test-bed leaves to be judged: the log's messages, the marks of tasks, what clients were told."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js import JetStreamContext

from bus import topology
from helmr.connection import connected
from helmr.reducers.queue import Limits


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a stream."""

    seq: int
    subject: str
    at: datetime
    headers: dict[str, str] = {}
    data: bytes = b""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What a task noted while it ran: ``what`` is start, tick, step, end or daemon; ``key`` is new for every execution.

    ``where`` is its working folder, that of a workspace on one host. ``at`` is in seconds since 1970, and ``mono`` by the clock
    of the host that never jumps.
    """

    what: str
    run: str
    attempt: int
    key: str
    pid: int
    where: str
    at: float
    mono: float


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A start that a client was told had happened, and what is to come of it.

    ``outcomes`` are the ends that are right for the task if nobody interferes: a status, or a failure code; ``midway`` those
    of an attempt that would be followed by another one, had nobody asked for the end.
    """

    run_id: str
    session_id: str
    kind: str
    n: int
    outcomes: frozenset[str]
    midway: frozenset[str] = frozenset()
    external_id: str | None = None
    reused: bool = False
    ttl: float | None = None
    #: Bytes of a line on stdout, if the task prints such.
    width: int = 40


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a client was told a token had been completed with."""

    token: str
    data: Any


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Everything there is to judge."""

    runs: tuple[Stored, ...] = ()
    logs: tuple[Stored, ...] = ()
    records: tuple[Stored, ...] = ()
    marks: tuple[Mark, ...] = ()
    starts: tuple[Start, ...] = ()
    answers: tuple[Answer, ...] = ()
    #: Runs that somebody may have asked to cancel, whatever came of the request.
    cancels: frozenset[str] = frozenset()
    #: How many runs of a queue may run at once.
    limits: dict[str, Limits] = {}
    #: How the history differs from a fresh fold of the log, table by table.
    differences: tuple[str, ...] = ()
    #: What is still there and should not be.
    leaks: tuple[str, ...] = ()
    #: Ends of parts that nobody asked for.
    crashes: tuple[str, ...] = ()


async def read_streams(url: str) -> dict[str, tuple[Stored, ...]]:
    """Every message of the streams that matter, by stream."""
    async with connected(url, name="chaos-evidence") as nc:
        names = (topology.RUNS, topology.LOGS, topology.SESSIONS)
        return {name: tuple(await read_on(nc, name)) for name in names}


async def read_on(nc: Nats, stream: str, seq: int = 0) -> list[Stored]:
    """The messages of a stream from after ``seq`` on."""
    js: JetStreamContext = nc.jetstream(timeout=10)
    found: list[Stored] = []
    while True:
        try:
            message: Any = await js.get_msg(stream, seq=seq + 1, direct=True, next=True, subject=">")
        except nats.js.errors.NotFoundError:
            return found
        seq = message.seq
        headers = dict(message.headers or {})
        at = datetime.fromisoformat(headers.pop("Nats-Time-Stamp"))
        found.append(Stored(seq=seq, subject=message.subject, at=at, headers=headers, data=message.data or b""))


def read_marks(folder: Path) -> tuple[Mark, ...]:
    """The marks that tasks left below the folder of an installation, in the order they were made."""
    paths = [*folder.glob("marks/*"), *folder.glob("host-*/workspaces/*/marks-*")]
    marks = {msgspec.convert(json.loads(line), Mark) for path in paths for line in path.read_bytes().splitlines()}
    return tuple(sorted(marks, key=lambda mark: mark.mono))


async def leaked_consumers(url: str, alive: set[str]) -> list[str]:
    """Lane consumers of workers that are gone."""
    async with connected(url, name="chaos-leaks") as nc:
        infos = await nc.jetstream().consumers_info(topology.RUNS)
    kept = {topology.lane_consumer_name(f"@{worker}") for worker in alive}
    prefix = topology.lane_consumer_name("@")
    return sorted(info.name for info in infos if info.name.startswith(prefix) and info.name not in kept)
