"""The engines that the conformance suite holds to one behaviour, and what tests of all of them do with a machine."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from helmr.connection import connect
from tests.integration.platform import Platform, RunningWorker, running
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import Engine, Exited, Machine, Message, Output, ProcessSpec
from worker.process_engine import ProcessEngine
from worker.worker import Worker

#: Each engine as a factory that takes a Helmr home.
FACTORIES: dict[str, Callable[[Path], Engine]] = {"docker": DockerEngine, "process": ProcessEngine}

Materialize = Callable[..., Coroutine[Any, Any, DockerMachine]]

_numbers = itertools.count()


class Finished(NamedTuple):
    """What a process left behind: its last frame, its output, its messages."""

    exited: Exited
    stdout: str
    stderr: str
    messages: list[dict[str, Any]]


async def run(machine: Machine, *argv: str, **options: Any) -> Finished:
    """Run a program in a machine to its end."""
    process = await machine.start(ProcessSpec(id=f"p{next(_numbers)}", kind="argv", argv=argv, **options))
    written: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    messages = []
    exited = None
    async for frame in process.frames():
        match frame:
            case Output(stream, _, data):
                written[stream] += data
            case Message(body):
                messages.append(body)
            case Exited():
                exited = frame
    assert exited is not None
    return Finished(exited, written["stdout"].decode(), written["stderr"].decode(), messages)


async def python(machine: Machine, code: str, **options: Any) -> Finished:
    """Run Python code in a machine."""
    return await run(machine, "python3", "-c", code, **options)


@asynccontextmanager
async def docker_running(home: Path, *, slots: int) -> AsyncIterator[Platform]:
    """A Helmr of one worker with the docker engine; its workspaces are deleted in the end."""
    async with running(home, workers=0) as platform:
        nc = await connect(platform.server.url, name="worker")
        engine, cleaner = DockerEngine(home), DockerEngine(home)  # a worker closes its engine
        worker = RunningWorker(Worker(nc, engine, await engine.check(), home=home, slots=slots), nc)
        await worker.start()
        platform.workers.append(worker)
        try:
            yield platform
        finally:
            await platform.stop_worker(worker)
            for folder in home.glob("workspaces/*"):
                await cleaner.delete(folder.name)
            await cleaner.close()
