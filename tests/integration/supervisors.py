"""A supervisor of a test's own, as a plain process, and a channel to it; the fixtures see that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import helmr.guest
from helmr.guest import tree
from worker.channel import Channel

SUPERVISOR = Path(helmr.guest.__file__).with_name("boot.py")


class Guest:
    """A supervisor of the test's own."""

    def __init__(
        self, folder: Path, options: dict[str, str], preparation: Callable[[], None] | None, python: str
    ) -> None:
        self.folder = folder
        self.workspace = folder / "workspace"
        self.workspace.mkdir(exist_ok=True)
        self.path = folder / "s"
        words = {
            "--socket": "s",
            "--workspace": str(self.workspace),
            "--home": str(folder / "home"),
            "--runner": "tests.integration.guest_tasks:main",
            **options,
        }
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(SUPERVISOR), *(word for pair in words.items() for word in pair)],
                cwd=folder,
                env={"PATH": os.environ["PATH"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=preparation,  # noqa: PLW1509  (no threads hold anything here)
            )

    async def connect(self, **options: Any) -> Channel:
        return await Channel.connect(self.path, **options)

    async def ended(self) -> int:
        async with asyncio.timeout(10):
            return await asyncio.to_thread(self.process.wait)

    def zygote(self) -> int:
        (pid,) = tree.children(self.process.pid)
        return pid

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(10)
        assert self.log.read_text() == ""
        marker = bytes(self.folder)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert marker not in path.read_bytes(), path
            except (FileNotFoundError, ProcessLookupError):
                continue


Boot = Callable[..., Guest]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Starts supervisors; at the end they must stop, silently, and leave no process."""
    guests: list[Guest] = []

    def start(preparation: Callable[[], None] | None = None, python: str = sys.executable, **options: str) -> Guest:
        folder = tmp_path / str(len(guests))
        folder.mkdir()
        flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        guests.append(Guest(folder, flags, preparation, python))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


@pytest.fixture
def guest(boot: Boot) -> Guest:
    return boot()


@pytest.fixture
async def channel(guest: Guest) -> AsyncIterator[Channel]:
    channel = await guest.connect()
    yield channel
    channel.close()
    await channel.wait_lost()
