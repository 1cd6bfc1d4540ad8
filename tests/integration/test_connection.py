"""A connection goes on after the answer to something that nobody waits for any more."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import nats.errors
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from helmr.connection import connect
from tests.chaos.proxy import proxied

pytestmark = pytest.mark.anyio


async def test_the_late_answer_to_a_flush_does_not_end_a_connection(nats_url: str, nc: Nats) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    errors: list[Exception] = []

    async def note(error: Exception) -> None:
        errors.append(error)

    async def hear(msg: Msg) -> None:
        heard.put_nowait(msg.data)

    async with proxied(urlsplit(nats_url).port or 0) as proxy:
        slow = await connect(proxy.url, name="slow", on_error=note)
        try:
            await slow.subscribe("heard", cb=hear)
            await slow.flush()
            proxy.hold()
            with pytest.raises(nats.errors.TimeoutError):
                await slow.flush(timeout=1)
            proxy.release()
            await slow.flush(timeout=30)
            await nc.publish("heard", b"still here")
            assert await asyncio.wait_for(heard.get(), 30) == b"still here"
        finally:
            await slow.close()
    assert (errors, slow.stats["reconnects"]) == ([], 0)


async def test_a_flush_comes_after_what_was_to_be_written_before(nc: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = nc._transport
    write, writelines = transport.write, transport.writelines
    written: list[bytes] = []

    def note(data: bytes) -> None:
        written.append(data)
        write(data)

    def note_lines(lines: list[bytes]) -> None:
        written.extend(lines)
        writelines(lines)

    monkeypatch.setattr(transport, "write", note)
    monkeypatch.setattr(transport, "writelines", note_lines)
    await nc.subscribe("late")
    await nc.flush()
    text = b"".join(written)
    assert text.index(b"SUB late") < text.index(b"PING")
