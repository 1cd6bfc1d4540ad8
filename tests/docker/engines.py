"""The engines that the conformance suite holds to one behaviour, and what tests of all of them do with a machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from worker.docker_engine import DockerEngine, DockerMachine
from worker.engine import Engine, Exited, Machine, Message, Output, ProcessSpec
from worker.process_engine import ProcessEngine

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
