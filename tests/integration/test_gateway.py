"""Tokens completed over HTTP, by friends and by strangers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bus.exposition import Address
from bus.gateway import serving
from bus.rate_limit import BURST, RateLimit
from helmr.client import AsyncClient
from helmr.models import NewToken
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task, tokens

    @task("take")
    def take(payload: str):
        return tokens.get(payload).wait()
"""


@pytest.fixture
async def url(platform: Platform) -> AsyncIterator[str]:
    """Where the endpoint answers; each test has its own, with its own limits."""
    async with serving(Address("127.0.0.1", 0), platform.control.log, platform.control.streams) as found:
        yield found


async def _post(url: str, path: str, body: bytes, *headers: str) -> tuple[int, Any]:
    """Status and JSON of the answer, by hand: a client would hide what a stranger can do."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = [f"POST {path} HTTP/1.1", "Host: helmr", "Connection: close", f"Content-Length: {len(body)}", *headers]
    try:
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        answer = await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()
    top, _, rest = answer.partition(b"\r\n\r\n")
    try:
        return int(top.split()[1]), json.loads(rest)
    except ValueError:
        return int(top.split()[1]), rest


async def _made(helmr: AsyncClient, **options: Any) -> tuple[NewToken, str]:
    made = await helmr.tokens.create(**options)
    return made, made.secret or ""


def _bearer(secret: str) -> str:
    return f"Authorization: Bearer {secret}"


async def test_a_run_goes_on_when_its_token_is_completed(helmr: AsyncClient, url: str) -> None:
    made, secret = await _made(helmr)
    started = await helmr.sessions.start("take", made.token.id)
    assert await _post(url, f"/v1/callbacks/{secret}", b'{"a": 1}') == (200, {"status": "completed"})
    assert await started.run.result(timeout=30) == {"a": 1}


async def test_the_same_data_twice_and_other_data(helmr: AsyncClient, url: str) -> None:
    made, secret = await _made(helmr)
    path = f"/v1/tokens/{made.token.id}/complete"
    assert (await _post(url, path, b'{"a": 1, "b": 2}', _bearer(secret)))[0] == 200
    assert (await _post(url, path, b'{"b": 2, "a": 1}', _bearer(secret)))[0] == 200
    assert await _post(url, path, b'{"a": 2}', _bearer(secret)) == (409, {"error": "completed"})
    assert (await helmr.tokens.get(made.token.id)).data == {"a": 1, "b": 2}


async def test_what_has_ended_otherwise(helmr: AsyncClient, url: str) -> None:
    made, secret = await _made(helmr, timeout=0.01)
    await asyncio.sleep(0.05)
    assert await _post(url, f"/v1/callbacks/{secret}", b"1") == (410, {"error": "expired"})
    made, secret = await _made(helmr)
    await helmr.tokens.cancel(made.token)
    assert await _post(url, f"/v1/callbacks/{secret}", b"1") == (409, {"error": "cancelled"})


async def test_strangers_learn_nothing(helmr: AsyncClient, url: str) -> None:
    made, secret = await _made(helmr)
    _, other = await _made(helmr)
    path = f"/v1/tokens/{made.token.id}/complete"
    wrong = [
        await _post(url, path, b"1"),
        await _post(url, path, b"1", _bearer("")),
        await _post(url, path, b"1", _bearer(secret[:-1])),
        await _post(url, path, b"1", _bearer(other)),
        await _post(url, path, b"1", _bearer("x" * 10_000)),
        await _post(url, "/v1/tokens/tok_01m8f0000000000000000000/complete", b"1", _bearer(secret)),
        await _post(url, "/v1/tokens/%2A/complete", b"1", _bearer(secret)),
        await _post(url, f"/v1/callbacks/{made.token.id}.guess", b"1"),
        await _post(url, "/v1/callbacks/%3E", b"1"),
    ]
    assert wrong == [(401, {"error": "unauthorized"})] * len(wrong)
    assert (await helmr.tokens.get(made.token.id)).status == "pending"
    assert (await _post(url, "/v1/tokens", b""))[0] == 404


async def test_bodies_are_bounded(helmr: AsyncClient, url: str) -> None:
    _, secret = await _made(helmr)
    path = f"/v1/callbacks/{secret}"
    assert await _post(url, path, b"x" * 10_000_000) == (413, {"error": "too_large"})
    assert await _post(url, path, b"{") == (400, {"error": "not_json"})
    assert await _post(url, path, b"[" * 100_000) == (400, {"error": "not_json"})
    assert (await _post(url, path, b"")) == (200, {"status": "completed"})


async def test_nobody_gets_more_than_a_share(url: str) -> None:
    tries = await asyncio.gather(*(_post(url, "/v1/callbacks/x.y", b"") for _ in range(int(BURST) + 30)))
    assert {status for status, _ in tries} == {401, 429}


def test_the_limit_fills_up_again() -> None:
    clock = [0.0]
    limit = RateLimit(lambda: clock[0], burst=2, rate=1)
    assert [limit.take("a") for _ in range(3)] == [True, True, False]
    assert limit.take("b")
    clock[0] = 1.0
    assert [limit.take("a") for _ in range(2)] == [True, False]
