"""How far an execution got, told from what is stored; and refused when that does not tell."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bus import bookmark, chunks
from bus.bookmark import Torn
from bus.log import Log
from helmr import events, ids, subjects
from helmr.chunks import LogEnd, Mark, headers
from helmr.subjects import Scope
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio

_SCOPE = Scope("acme", "dev")
_EXECUTION = 4


class Stored:
    """What the worker of a run's first dispatch has stored."""

    def __init__(self, platform: Platform) -> None:
        self.log = Log(platform.nc)
        self.js = self.log.js
        self.run = ids.new("run")
        self.numbers = itertools.count(1)
        self.landed = 0

    async def put(self, stream: str, data: bytes, *, offset: int, at: tuple[int, int], **facts: Any) -> None:
        """A chunk; ``at`` is the position, and the offset that it stands for."""
        position, reached = at
        mark = Mark(
            execution=_EXECUTION,
            position=position,
            offset=reached,
            number=next(self.numbers),
            landed=self.landed,
            **facts,
        )
        fields = headers(offset=offset, dispatch=1, at=events.now(), mark=mark)
        self.landed = (await self.js.publish(subjects.log(_SCOPE, self.run, 1, stream), data, headers=fields)).seq

    async def put_foreign(self, stream: str) -> None:
        """A chunk of an earlier execution, of another worker."""
        mark = Mark(execution=_EXECUTION - 2, position=9, offset=9, number=1, landed=0)
        fields = headers(offset=0, dispatch=0, at=events.now(), mark=mark)
        await self.js.publish(subjects.log(_SCOPE, self.run, 1, stream), b"123456789", headers=fields)

    async def find(self) -> dict[str, LogEnd]:
        found = await bookmark.find(self.js, _SCOPE, self.run, execution=_EXECUTION, attempt=1, dispatch=2)
        assert (found.events, found.waiting, found.began) == (0, 0, False)
        return dict(found.log)


@pytest.fixture
def log(platform: Platform) -> Stored:
    return Stored(platform)


async def test_nothing_stored_is_the_beginning(log: Stored) -> None:
    assert await log.find() == dict.fromkeys(bookmark.STREAMS, LogEnd())


async def test_each_stream_goes_on_at_its_last_mark(log: Stored) -> None:
    await log.put("stdout", b"0123", offset=0, at=(4, 4))
    await log.put("log", b"line\n", offset=0, at=(7, 5))
    await log.put("stdout", b"***", offset=4, at=(4, 4))  # a value that is masked, cut off before its end
    assert await log.find() == {"stdout": LogEnd(4, 3), "stderr": LogEnd(), "log": LogEnd(7)}


async def test_what_an_earlier_execution_stores_late_hides_nothing(log: Stored) -> None:
    await log.put("stdout", b"0123", offset=0, at=(4, 4))
    await log.put("log", b"line\n", offset=0, at=(7, 5))
    await log.put_foreign("stdout")
    await log.put_foreign("log")
    assert await log.find() == {"stdout": LogEnd(4), "stderr": LogEnd(), "log": LogEnd(7)}


async def test_what_earlier_executions_stored_is_not_taken_for_ours(log: Stored) -> None:
    await log.put_foreign("stderr")
    assert (await log.find())["stderr"] == LogEnd()


async def test_too_much_of_another_execution_is_not_looked_through(
    log: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookmark, "_MOST", 3)
    for _ in range(4):
        await log.put_foreign("stdout")
    with pytest.raises(Torn, match="too far back"):
        await log.find()


async def test_a_grave_dug_by_control_keeps_the_mark(log: Stored) -> None:
    await log.put("log", b"line\n", offset=0, at=(7, 5))
    await chunks.bury(log.log, _SCOPE, log.run, attempt=1, dispatch=1)
    assert (await log.find())["log"] == LogEnd(7)


async def test_the_grave_of_one_who_said_nothing_is_none(log: Stored) -> None:
    await chunks.bury(log.log, _SCOPE, log.run, attempt=1, dispatch=1)
    assert (await log.find())["log"] == LogEnd()


async def test_a_chunk_that_was_lost_is_noticed(log: Stored) -> None:
    await log.put("stdout", b"0123", offset=0, at=(4, 4))
    landed = log.landed
    next(log.numbers)
    for number in range(3):
        log.landed = landed
        await log.put("stdout", b"89", offset=8 + 2 * number, at=(10 + 2 * number, 10 + 2 * number))
    with pytest.raises(Torn, match="lost"):
        await log.find()


async def test_what_the_worker_alone_knew_is_noticed(log: Stored) -> None:
    await log.put("log", b"", offset=0, at=(0, 0), whole=False)
    with pytest.raises(Torn, match="nowhere else"):
        await log.find()


async def test_what_carries_no_mark_tells_nothing(log: Stored) -> None:
    fields = headers(offset=0, dispatch=1, at=events.now())
    await log.js.publish(subjects.log(_SCOPE, log.run, 1, "stdout"), b"0123", headers=fields)
    with pytest.raises(Torn):
        await log.find()


async def test_another_executions_log_is_not_gone_on_with(log: Stored) -> None:
    await log.put("stdout", b"0123", offset=0, at=(4, 4))
    found = await bookmark.find(log.js, _SCOPE, log.run, execution=9, attempt=1, dispatch=2)
    assert found.log["stdout"] == LogEnd()
