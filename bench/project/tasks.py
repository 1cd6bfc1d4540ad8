"""The tasks the benchmarks start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helmr import Queue, step, streams, task

# Named at the start, by bench.queues.
one = Queue("one", concurrency=1)
four = Queue("four", concurrency=4)
fair = Queue("fair", concurrency=8, concurrency_per_key=4)

_SLEEP = "import time; time.sleep(3600)"
_DEAF = f"import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); {_SLEEP}"


@task("noop")
def noop() -> None:
    """Say when the task's body was reached, on the clock that all processes of a machine share."""
    print(time.monotonic_ns(), flush=True)


@task("sleep")
def sleep() -> None:
    """Never end by itself; SIGTERM ends it."""
    print(os.getpid(), flush=True)
    time.sleep(3600)


@task("prints")
def prints(payload: dict[str, float]) -> int:
    """Print numbered lines, ten at a time with a pause after them; returns how often this was begun in the workspace."""
    with Path("begun").open("a") as file:
        file.write("x")
    for number in range(int(payload["lines"])):
        print(f"{number:08d} {'x' * 70}")
        if number % 10 == 0:
            time.sleep(payload["pause"])
    return Path("begun").stat().st_size


@task("deaf", cancel_grace="1s")
def deaf() -> None:
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(3600)


@task("daemon", cancel_grace="1s")
def daemon() -> None:
    """Leave a grandchild behind that ignores SIGTERM and belongs to nobody any more."""
    if os.fork() == 0:
        subprocess.Popen([sys.executable, "-c", _DEAF])
        os._exit(0)
    os.wait()
    print(os.getpid(), flush=True)
    time.sleep(3600)


@task("session", cancel_grace="1s")
def session() -> None:
    """Start a child in a session of its own that ignores SIGTERM."""
    subprocess.Popen([sys.executable, "-c", _DEAF], start_new_session=True)
    print(os.getpid(), flush=True)
    time.sleep(3600)


notes = streams.input("notes")


@task("wakes", park_after="60s")
def wakes(payload: int) -> list[float]:
    """Wait so many times; when each wait was over."""
    return [_woken() for _ in range(payload)]


@task("wakes-parked", park_after=0)
def wakes_parked(payload: int) -> list[float]:
    """The same, in a new process each time."""
    return [_woken() for _ in range(payload)]


def _woken() -> float:
    notes.wait()
    return step("woken", time.time)


@task("sleeper", park_after=0)
def sleeper() -> None:
    """Wait once."""
    notes.wait()
