# ruff: noqa: T201  (printing is what is tested)
"""Tasks for the tests of the runner: each does one thing that a runner must cope with."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypedDict

import helmr
from helmr import TaskContext, logger, metadata, streams, task

notes = streams.output("notes", schema=dict[str, int])


@dataclass
class Person:
    name: str
    age: int = 1


class Row(TypedDict):
    x: int


@task
def facts(payload: Person, ctx: TaskContext) -> dict[str, Any]:
    return {
        "type": type(payload).__name__,
        "age": payload.age,
        "run": ctx.run.id,
        "session": ctx.session.id,
        "attempt": ctx.attempt,
        "turn": ctx.turn,
        "workspace": ctx.workspace.path,
        "cwd": str(Path.cwd()),
        "cancelled": ctx.cancelled,
    }


@task
def nothing() -> None: ...


@task
def echo(payload):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return payload


@task
def with_default(payload: int = 7) -> int:
    return payload


@task
def with_nullable_default(payload: int | None = 7) -> int | None:
    return payload


@task
async def asynchronous(payload: str) -> str:
    await asyncio.sleep(0)
    return payload


@task
def rows(payload: Row) -> list[Row]:
    return [payload]


@task
def times(payload: dt.datetime) -> Any:
    return payload, {payload.year}


@task
def prints() -> int:
    print('{"op":"result"}')
    sys.stderr.write("err")
    sys.stdout.write("tail")
    return 1


@task
def says() -> None:
    logger.info("one", n=1)
    metadata.set("phase", "two")
    notes.append({"n": 3}, correlation_id="c")
    logging.getLogger("lib").warning("four %s", 4, extra={"k": "v"})
    logging.getLogger("lib").debug("never")
    try:
        print(1 // 0)
    except ZeroDivisionError:
        logger.exception("five")


@task
def chats() -> None:
    def chat(speaker: int) -> None:
        for number in range(200):
            logger.info("x" * 3000, speaker=speaker, number=number)

    threads = [threading.Thread(target=chat, args=(speaker,)) for speaker in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


@task
def surrogates() -> str:
    logger.info("a\ud800", b="\udfff")
    return "\ud800"


@task
def long_output() -> dict[str, str]:
    return {"text": '"\\ä😀' * 500_000}


# Failures


@task
def raises() -> None:
    raise ValueError("bad value")


@task
async def raises_later() -> None:
    raise KeyError("k")


@task
def raises_from() -> None:
    try:
        raises.fn()
    except ValueError as failure:
        raise RuntimeError("worse") from failure


@task
def raises_unprintable() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise Unprintable


@task
def raises_at_length() -> None:
    raise ValueError("x" * 3_000_000 + "end")


@task
def recurses() -> None:
    def deeper() -> None:
        deeper()

    deeper()


@task
def raises_hint() -> None:
    raise helmr.UsageError("wrong", hint="do so")


@task
def raises_cancelled() -> None:
    raise helmr.Cancelled


@task
async def raises_asyncio_cancelled() -> None:
    raise asyncio.CancelledError


@task
def exits(payload: Any) -> None:
    sys.exit(payload)


@task
async def exits_later() -> None:
    sys.exit(4)


@task
def takes_a_number(payload: int) -> int:
    return payload


@task
def returns_bytes() -> Any:
    return b"x"


@task
def returns_nan() -> float:
    return float("nan")


@task
def returns_other() -> int:
    return "x"  # type: ignore[return-value]


@task
def returns_something() -> None:
    return 1  # type: ignore[return-value]


@task
def returns_too_much() -> str:
    return "x" * (16 * 1024 * 1024)


# What is left behind


@task
def leaves_thread() -> int:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return 1


@task
async def leaves_asyncio_task() -> int:
    leaves.append(asyncio.create_task(asyncio.sleep(60)))
    await asyncio.sleep(0)
    return 1


@task
async def leaves_executor() -> int:
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
    return 1


@task
async def leaves_stubborn_task() -> int:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    leaves.append(asyncio.create_task(stubborn()))
    await asyncio.sleep(0)
    return 1


@task
def leaves_unflushed_file() -> int:
    file = open("kept.txt", "w")  # noqa: PTH123, SIM115
    file.write("all of it")
    leaves.append(file)
    return 1


@task
def closes_stdout() -> int:
    sys.stdout.close()
    return 1


leaves: list[asyncio.Task[Any] | IO[str]] = []


# Children


@task
def forks() -> Any:
    if os.fork() == 0:
        logger.info("child")
        try:
            metadata.set("a", 1)
        except helmr.UsageError:
            print("refused")
        return "child"
    return os.wait()[1]


@task
def forks_failing() -> list[int]:
    codes = []
    for way in ("exit", "raise", "message"):
        if os.fork() == 0:
            if way == "raise":
                raise RuntimeError("in the child")
            sys.exit(5 if way == "exit" else "bye")
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    return codes


@task
def terminates_child() -> int:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(tell, b"x")
        time.sleep(60)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Cancellation: each prints "go" when it can be cancelled


@task
def cancelled(ctx: TaskContext) -> None:
    try:
        print("go")
        time.sleep(60)
    finally:
        print("cleaned", ctx.cancelled)


@task
async def cancelled_later(ctx: TaskContext) -> None:
    try:
        print("go")
        await asyncio.sleep(60)
    finally:
        print("cleaned", ctx.cancelled)


@task
def returns_when_cancelled(ctx: TaskContext) -> str:
    try:
        print("go")
        time.sleep(60)
    except helmr.Cancelled:
        print("cleaned", ctx.cancelled)
    return "partial"


@task
async def returns_when_cancelled_later(ctx: TaskContext) -> str:
    try:
        print("go")
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print("cleaned", ctx.cancelled)
    return "partial"


@task
def catches_exceptions(ctx: TaskContext) -> None:
    while True:
        try:
            print("go")
            time.sleep(60)
        except Exception:  # noqa: BLE001, S112
            continue
        finally:
            print("cleaned", ctx.cancelled)


@task
def fails_cleaning_up(ctx: TaskContext) -> None:
    try:
        print("go")
        time.sleep(60)
    finally:
        print("cleaned", ctx.cancelled)
        raise OSError("while cleaning up")


@task
def cleans_slowly() -> None:
    try:
        print("go")
        time.sleep(60)
    finally:
        print("cleaning")
        time.sleep(0.3)
        print("clean")


@task
def logs_for_ever() -> None:
    while True:
        logger.info("x" * 60_000)
