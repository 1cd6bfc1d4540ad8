"""One part of Helmr as a process of its own, for tests that kill it: ``control URL [APPENDS]`` or ``worker URL HOME [ENGINE]``.

Prints one line when it is ready: the worker's id, or ``control``. SIGTERM stops it in good order.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bus.control import Control
from bus.keyring import KeyRing
from bus.server import die_with_parent
from helmr.connection import connect
from worker.docker_engine import DockerEngine
from worker.process_engine import ProcessEngine
from worker.worker import Worker


async def _worker(url: str, home: Path, stop: asyncio.Event, engine_name: str = "process") -> None:
    nc = await connect(url, name="worker")
    engine = DockerEngine(home) if engine_name == "docker" else ProcessEngine(home / "engine")
    worker = Worker(nc, engine, await engine.check(), home=home, slots=4)
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run(stop, ready))
        await ready.wait()
        print(worker.id, flush=True)  # noqa: T201
    await nc.close()


async def _control(url: str, stop: asyncio.Event, appends: str = "") -> None:
    nc = await connect(url, name="control")
    control = Control(nc, KeyRing(text=os.environ.get("HELMR_SECRET_KEY")))
    if appends:
        _die_after(control, int(appends))
    async with asyncio.TaskGroup() as tasks:
        inner = tasks.create_task(_serve(control))
        await stop.wait()
        inner.cancel()
    control.close()
    await nc.close()


def _die_after(control: Control, appends: int) -> None:
    """Have the process end like one that is killed when that many events have been appended."""
    append, count = control.log.append, itertools.count(1)

    async def mortal(*args: Any, **options: Any) -> Any:
        position = await append(*args, **options)
        if next(count) >= appends:
            os._exit(9)
        return position

    control.log.append = mortal  # type: ignore[method-assign]


async def _serve(control: Control) -> None:
    async with asyncio.TaskGroup() as tasks:
        await control.start(tasks)
        print("control", flush=True)  # noqa: T201
        await asyncio.Event().wait()


async def main(part: str, url: str, *rest: str) -> None:
    """Be that part until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    if part == "control":
        await _control(url, stop, *rest)
    else:
        await _worker(url, Path(rest[0]), stop, *rest[1:])


if __name__ == "__main__":
    die_with_parent()
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main(*sys.argv[1:]))
