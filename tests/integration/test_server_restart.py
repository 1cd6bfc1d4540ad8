"""The embedded NATS server is started again however it ends, also while it is only just starting; not for ever, though."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from bus import server as module
from bus.server import EmbeddedServer
from helmr.connection import connected
from helmr.errors import Unavailable

pytestmark = pytest.mark.anyio


async def _next(server: EmbeddedServer, pid: int | None) -> int:
    """The process that was started in place of ``pid``."""
    async with asyncio.timeout(30):
        while server.pid == pid or server.pid is None:  # noqa: ASYNC110  # the server's keeper tells nobody
            await asyncio.sleep(0)
    return server.pid


async def test_it_is_started_again_when_it_is_killed_while_it_starts(
    nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESTART_DELAY", 0.01)
    keeping = asyncio.create_task(nats_server.supervise())
    pid = nats_server.pid
    assert pid is not None
    for _ in range(4):  # the first one while it answers, the others before they do
        os.kill(pid, signal.SIGKILL)
        pid = await _next(nats_server, pid)
    async with asyncio.timeout(30), connected(nats_server.url, name="test") as nc:
        await nc.jetstream().account_info()
    assert not keeping.done()
    await nats_server.stop()
    await keeping


def _break(monkeypatch: pytest.MonkeyPatch, folder: Path, *, delay: float) -> None:
    """Have every further start fail, and the first of them be followed by another one after ``delay`` seconds."""
    broken = folder / "nats-server"
    broken.write_text("#!/bin/sh\necho no room >&2\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module, "find_binary", lambda: broken)
    monkeypatch.setattr(module, "_RESTART_DELAY", delay)


def _kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def test_it_is_given_up_when_it_never_gets_as_far_as_answering(
    nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _break(monkeypatch, tmp_path, delay=0.001)
    _kill(nats_server)
    with pytest.raises(Unavailable, match=r"(?s)ended with 7.*no room"):
        async with asyncio.timeout(30):
            await nats_server.supervise()


async def test_it_stays_stopped_when_it_is_stopped_between_two_starts(
    nats_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _break(monkeypatch, tmp_path, delay=3600.0)
    keeping = asyncio.create_task(nats_server.supervise())
    _kill(nats_server)
    async with asyncio.timeout(30):
        while "starting it again in" not in caplog.text:  # noqa: ASYNC110  # a line in the log is all there is
            await asyncio.sleep(0.01)
        last = nats_server.pid
        await nats_server.stop()
        await keeping
    assert nats_server.pid == last
