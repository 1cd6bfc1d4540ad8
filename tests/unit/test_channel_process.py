"""What a worker tells a supervisor it has taken: seldom, but always before the supervisor has to stop reading the task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import cast

import pytest

from helmr.guest import journal, protocol
from worker.channel import Channel
from worker.channel_process import ChannelProcess
from worker.engine import Output

pytestmark = pytest.mark.anyio


class Supervisor:
    """The other end: it sends what a full window allows, and goes on when it is told what was taken."""

    def __init__(self) -> None:
        self.journal = journal.Journal(1)
        self.acknowledgements = 0

    def acknowledge(self, process: ChannelProcess) -> None:
        """The channel's part (:meth:`worker.channel.Channel.acknowledge`)."""
        if process.owing:
            self.acknowledgements += 1
            self.journal.acknowledge(process.taken)
            process.acknowledged()

    def send(self, process: ChannelProcess, frames: Iterable[bytes]) -> int:
        """Send as many of the frames as the window has room for; returns how many."""
        sent = 0
        for body in frames:
            if self.journal.full:
                break
            self.journal.append(protocol.STDOUT, body)
            process.deliver(self.journal.last, Output(stream="stdout", offset=0, data=body), len(body))
            sent += 1
        return sent


@pytest.mark.parametrize("size", [1, 60_000, protocol.CHUNK])
@pytest.mark.parametrize("burst", [1, 10, 10_000])
async def test_whoever_takes_frames_is_sent_more_however_they_arrive(size: int, burst: int) -> None:
    supervisor = Supervisor()
    process = ChannelProcess(cast("Channel", supervisor), "proc", 1)
    wanted = 3 * max(journal.WINDOW_BYTES // size, journal.WINDOW_FRAMES)
    wanted = min(wanted, 3 * journal.WINDOW_FRAMES)
    left = [b"x" * size] * wanted
    taken = 0
    while taken < wanted:
        sent = supervisor.send(process, left[:burst])
        assert sent, "the supervisor waits for an acknowledgement, and the worker for a frame"
        del left[:sent]
        for _ in range(sent):
            async with asyncio.timeout(5):
                assert await process.next_frame() is not None
            taken += 1
    assert supervisor.acknowledgements < wanted / 10
