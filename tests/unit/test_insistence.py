"""What a part needs to begin is asked for again while the server does not answer, and not for ever."""

from __future__ import annotations

import nats.errors
import pytest

from bus import insistence
from bus.insistence import insist
from helmr.errors import Unavailable

pytestmark = pytest.mark.anyio


class _Server:
    """Answers after it has not for some times."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.asked = 0

    async def ask(self) -> None:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insistence, "_PAUSE", 0.0)


async def test_it_is_asked_again_until_it_answers() -> None:
    server = _Server(nats.errors.TimeoutError(), Unavailable("not now"), ConnectionResetError())
    await insist(server.ask)
    assert server.asked == 4


async def test_it_is_given_up_with_what_came_last() -> None:
    server = _Server(*(nats.errors.TimeoutError() for _ in range(3)))
    with pytest.raises(Unavailable, match="nats: timeout") as failed:
        await insist(server.ask, patience=-1.0)
    assert failed.value.hint
    assert server.asked == 1


async def test_a_bug_is_not_asked_again() -> None:
    server = _Server(KeyError("seq"))
    with pytest.raises(KeyError):
        await insist(server.ask)
    assert server.asked == 1
