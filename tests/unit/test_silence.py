"""A machine that does not answer is ended; one that does is not, nor one of which nothing is expected, or not heard."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helmr.errors import EngineUnavailable
from worker.silence import ASK_EVERY, UNANSWERED, end_when_silent

pytestmark = pytest.mark.anyio


class Channel:
    """A connection whose other end does, after each question, what ``answers`` says."""

    def __init__(self, answers: Callable[[int], bool], *, busy: bool = True, lives: int = 3 * UNANSWERED) -> None:
        self.lost, self.heard, self.busy = "", 0, busy
        self.asked = self.naps = self.ended = 0
        self.why = ""
        self.oversleeps = False
        self._answers, self._lives = answers, lives

    def ping(self) -> None:
        self.asked += 1
        self.heard += self._answers(self.asked)

    def blame(self, reason: str) -> None:
        self.why = reason

    async def sleep(self, seconds: float) -> float:
        self.naps += 1
        if self.naps >= self._lives:
            self.lost = "the test is over"
        return 100 * seconds if self.oversleeps else seconds

    async def end(self) -> None:
        self.ended += 1
        self.lost = "ended"


async def _mind(channel: Channel) -> Channel:
    await end_when_silent(channel, channel.end, sleep=channel.sleep)
    return channel


async def test_it_is_ended_after_so_many_questions() -> None:
    channel = await _mind(Channel(lambda _: False))
    assert (channel.ended, channel.asked) == (1, UNANSWERED)
    assert channel.why == f"it did not answer for {ASK_EVERY * UNANSWERED:.0f} s"


async def test_an_answer_now_and_then_is_enough() -> None:
    channel = await _mind(Channel(lambda number: number % UNANSWERED == 0))
    assert channel.ended == 0


async def test_nothing_is_asked_of_an_idle_machine() -> None:
    channel = await _mind(Channel(lambda _: False, busy=False))
    assert (channel.ended, channel.asked) == (0, 0)


async def test_a_silence_through_which_we_slept_does_not_count() -> None:
    channel = Channel(lambda _: False)
    channel.oversleeps = True
    assert (await _mind(channel)).ended == 0


async def test_it_is_tried_again_while_the_engine_is_away() -> None:
    channel = Channel(lambda _: False)
    tries = []

    async def end() -> None:
        tries.append(channel.asked)
        if len(tries) < 3:
            raise EngineUnavailable("no Docker engine answers")
        await channel.end()

    await end_when_silent(channel, end, sleep=channel.sleep)
    assert tries == [UNANSWERED, UNANSWERED + 1, UNANSWERED + 2]
