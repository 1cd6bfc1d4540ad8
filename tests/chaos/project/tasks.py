"""What the runs of the test-bed do. Each execution leaves marks, and what it writes describes itself.

A mark is a line of JSON in a file of the run's own: which execution (``key`` is new for every one), of which run and attempt,
and when by the clocks of this host. While an execution lives it leaves one every 50 ms, so that its end is known even if it was
killed. The files lie in the folder that the metadata name, because a workspace may go back to an earlier version; in a
container, which sees no other, in the workspace. What is printed is made of numbered lines, so that the checker knows every
byte that must have come before any other.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helmr import Queue, Retry, TaskContext, WaitTimeout, logger, metadata, step, streams, task, timers, tokens

Payload = dict[str, Any]
Output = dict[str, Any]
_TICK = 0.05
records = streams.output("records")
answers = streams.input("answers")
narrow = Queue("narrow", concurrency=1)
wide = Queue("wide", concurrency=4, concurrency_per_key=2)


def mark(what: str, ctx: TaskContext, *, key: str) -> None:
    """Append one mark; one short write is atomic."""
    body = {"what": what, "run": ctx.run.id, "attempt": ctx.attempt, "key": key, "pid": os.getpid()}
    body |= {"at": time.time(), "mono": time.monotonic(), "where": str(Path.cwd())}
    path = Path(ctx.run.metadata.get("marks", "."), f"marks-{ctx.run.id}")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(body) + "\n").encode())
    finally:
        os.close(handle)


@contextmanager
def execution(ctx: TaskContext) -> Iterator[str]:
    """Leave marks from the beginning to the end of a block; yields the execution's key."""
    done = threading.Event()
    key = uuid.uuid4().hex

    def tick() -> None:
        while not done.wait(_TICK):
            mark("tick", ctx, key=key)

    mark("start", ctx, key=key)
    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield key
    finally:
        done.set()
        ticking.join()
        mark("end", ctx, key=key)


def write_lines(ctx: TaskContext, first: int, last: int, *, width: int = 40) -> None:
    """Print the lines ``first`` to ``last - 1``: see ``tests.chaos.lines``."""
    for number in range(first, last):
        head = f"{ctx.run.id} {ctx.attempt} {number:08d} "
        print(head + "x" * max(width - len(head) - 1, 0), flush=True)


@task("noop")
def noop(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        return {"n": payload["n"]}


@task("prints")
def prints(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        for begin in range(0, payload["lines"], 50):
            write_lines(ctx, begin, min(begin + 50, payload["lines"]), width=payload["width"])
            logger.info("printed", lines=begin)
            time.sleep(payload["pause"])
        return {"n": payload["n"]}


@task("sleeps", cancel_grace="2s")
def sleeps(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        write_lines(ctx, 0, 1)
        time.sleep(payload["seconds"])
        return {"n": payload["n"]}


@task("sleeps-async", cancel_grace="2s")
async def sleeps_async(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        await asyncio.sleep(payload["seconds"])
        return {"n": payload["n"]}


@task("fails")
def fails(payload: Payload, ctx: TaskContext) -> None:
    with execution(ctx):
        write_lines(ctx, 0, 3)
        raise ValueError(f"as asked: {payload['n']}")


@task("retries", retry=Retry(max_attempts=3, min_delay=0.1, max_delay=1.0))
def retries(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        write_lines(ctx, 0, 3)
        if ctx.attempt < payload["succeeds_at"]:
            raise ValueError("not yet")
        return {"n": payload["n"]}


@task("ends-by-signal", retry=Retry(max_attempts=2, min_delay=0.1))
def ends_by_signal(payload: Payload, ctx: TaskContext) -> None:
    with execution(ctx):
        write_lines(ctx, 0, 2)
        os.kill(os.getpid(), getattr(signal, payload["signal"]))
        time.sleep(5)


@task("stubborn", cancel_grace="1s", max_duration="6s")
def stubborn(payload: Payload, ctx: TaskContext) -> Output:
    """Ignores every request to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with execution(ctx):
        end = time.monotonic() + payload["seconds"]
        while time.monotonic() < end:
            try:
                time.sleep(0.1)
            except BaseException:  # noqa: BLE001, S112
                continue
        return {"n": payload["n"]}


@task("leaves-daemon")
def leaves_daemon(payload: Payload, ctx: TaskContext) -> Output:
    """Ends at once, and leaves a daemon in a session of its own that must not outlive the run."""
    with execution(ctx):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                while True:
                    mark("daemon", ctx, key=f"daemon-{os.getpid()}")
                    time.sleep(_TICK)
            os._exit(0)
        time.sleep(payload["seconds"])
        return {"n": payload["n"]}


@task("keeps-records")
def keeps_records(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx) as key:
        for number in range(payload["records"]):
            records.append({"run": ctx.run.id, "attempt": ctx.attempt, "key": key, "number": number})
            metadata.set("reached", number)
            time.sleep(payload["pause"])
        return {"n": payload["n"]}


@task("once", on_worker_lost="fail")
def once(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        time.sleep(payload["seconds"])
        return {"n": payload["n"]}


@dataclass
class Order:
    """A payload with a schema."""

    n: int
    items: list[str]
    note: str = ""


@task("typed")
def typed(payload: Order, ctx: TaskContext) -> Output:
    with execution(ctx):
        return {"n": payload.n, "items": len(payload.items)}


@task("narrow", queue=narrow)
def in_narrow(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        time.sleep(payload["seconds"])
        return {"n": payload["n"]}


@task("wide", queue=wide, retry=Retry(max_attempts=2, min_delay=0.1))
def in_wide(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        time.sleep(payload["seconds"])
        if payload["fails"] and ctx.attempt == 1:
            raise ValueError("not yet")
        return {"n": payload["n"]}


@task("waits-for-input", park_after="1s")
def waits_for_input(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx) as key:
        step("effect", lambda: mark("step", ctx, key=key))
        try:
            answers.wait(timeout=payload["timeout"])
        except WaitTimeout:
            metadata.set("answered", value=False)
        return {"n": payload["n"]}


@task("waits-for-token", park_after="1s")
def waits_for_token(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx):
        try:
            return {"n": payload["n"], "answer": tokens.get(payload["token"]).wait()}
        except WaitTimeout:
            return {"n": payload["n"], "answer": None}


@task("sleeps-durably", park_after="300ms")
def sleeps_durably(payload: Payload, ctx: TaskContext) -> Output:
    with execution(ctx) as key:
        timers.sleep(payload["seconds"])
        step("effect", lambda: mark("step", ctx, key=key))
        timers.sleep(payload["seconds"])
        return {"n": payload["n"]}
