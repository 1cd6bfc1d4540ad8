"""Access tokens over HTTP: each allows one thing, so often, for so long; and tells nobody else anything."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bus import records
from bus.exposition import Address
from bus.gateway import serving
from bus.stored import get_message
from bus.topology import RUNS, SESSIONS
from helmr import subjects
from helmr.client import AsyncClient
from helmr.client.sessions import Started
from helmr.errors import NotFound, UsageError
from tests.integration.history import history
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio

TASKS = """
    import dataclasses
    from helmr import streams, task, tokens

    @dataclasses.dataclass
    class Note:
        text: str

    notes = streams.input("notes", schema=Note)
    replies = streams.output("replies")

    @task("talk")
    def talk(payload: int):
        for _ in range(payload):
            note = notes.wait()
            replies.append({"echo": note.text}, correlation_id=note.text[:1])

    @task("take")
    def take(payload: str):
        return tokens.get(payload).wait()
"""


class Answer(NamedTuple):
    """Status and JSON of an answer."""

    status: int
    body: Any


_NO = Answer(401, {"error": "unauthorized"})


@pytest.fixture
async def url(platform: Platform) -> AsyncIterator[str]:
    """Where the endpoint answers; each test has its own, with its own limits."""
    async with serving(Address("127.0.0.1", 0), platform.control.log, platform.control.streams) as found:
        yield found


async def ask(url: str, secret: str | None, line: str, data: Any = None, **headers: str) -> Answer:
    """``line``: method and path. The headers' names are written with underscores."""
    async with asked(url, secret, line, data, **headers) as (status, reader):
        return Answer(status, json.loads(await asyncio.wait_for(reader.read(), 30) or b"null"))


@asynccontextmanager
async def asked(
    url: str, secret: str | None, line: str, data: Any = None, **headers: str
) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
    """The status of an answer, and where to read what follows."""
    host, port = url.removeprefix("http://").split(":")
    body = b"" if data is None else json.dumps(data).encode()
    sent = {"Host": "helmr", "Connection": "close", "Content-Length": str(len(body)), **headers}
    if secret is not None:
        sent["Authorization"] = f"Bearer {secret}"
    head = [f"{line} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in sent.items()), "", ""]
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write("\r\n".join(head).encode() + body)
        top = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        yield int(top.split()[1]), reader
    finally:
        writer.close()


def _in(started: Started, stream: str = "notes") -> str:
    return f"POST /v1/sessions/{started.session.id}/input/{stream}"


def _out(started: Started, query: str = "") -> str:
    return f"GET /v1/sessions/{started.session.id}/output/replies{query}"


async def _for_notes(helmr: AsyncClient, started: Started, **options: Any) -> tuple[str, str]:
    made = await helmr.access.for_input(started.session, "notes", **options)
    assert made.secret is not None
    return made.access.id, made.secret


async def test_a_run_goes_on_with_what_is_appended(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 1)
    access, secret = await _for_notes(helmr, started, note="for ada")
    answer = await ask(url, secret, _in(started), {"text": "hello"}, Correlation_Id="c")
    assert (answer.status, answer.body["sequence"]) == (200, 1)
    assert (await started.run.wait(timeout=60)).status == "succeeded"
    record = (await helmr.sessions.open(started.session).input("notes").list())[0]
    assert (record.id, record.access_id, record.correlation_id) == (answer.body["id"], access, "c")
    shown = await helmr.access.get(access)
    assert (shown.status, shown.used, shown.note, shown.stream) == ("active", 0, "for ada", "notes")


async def test_what_does_not_fit_is_not_appended_nor_counted(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 1)
    access, secret = await _for_notes(helmr, started, uses=1)
    assert await ask(url, secret, _in(started), {"txt": 1}) == (422, {"error": "invalid", "path": "$"})
    assert await ask(url, secret, _in(started), {"text": 1}) == (422, {"error": "invalid", "path": "$.text"})
    assert (await ask(url, secret, _in(started), {"text": "x" * 300_000})).status == 413
    assert (await ask(url, secret, _in(started), {"text": "a"}, Idempotency_Key="k" * 600)).status == 400
    assert (await helmr.access.get(access)).used == 0
    assert (await ask(url, secret, _in(started), {"text": "a"})).status == 200
    await started.run.wait(timeout=60)
    await helmr.sessions.close(started.session)
    _, late = await _for_notes(helmr, started)
    assert await ask(url, late, _in(started), {"text": "a"}) == (409, {"error": "closed"})


async def test_uses_are_counted_exactly_whoever_hurries(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 3)
    access, secret = await _for_notes(helmr, started, uses=3)
    answers = await asyncio.gather(*(ask(url, secret, _in(started), {"text": str(n)}) for n in range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 3 + [401] * 9
    shown = await helmr.access.get(access)
    assert (shown.status, shown.used) == ("used_up", 3)
    assert len(await helmr.sessions.open(started.session).input("notes").list()) == 3


async def test_a_repeated_request_counts_once_even_as_the_last(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 1)
    access, secret = await _for_notes(helmr, started, uses=1)
    first = await ask(url, secret, _in(started), {"text": "a"}, Idempotency_Key="k")
    assert first.status == 200
    assert await ask(url, secret, _in(started), {"text": "a"}, Idempotency_Key="k") == first
    conflict = Answer(409, {"error": "conflict"})
    assert await ask(url, secret, _in(started), {"text": "b"}, Idempotency_Key="k") == conflict
    assert await ask(url, secret, _in(started), {"text": "a"}) == _NO
    assert (await helmr.access.get(access)).used == 1
    # Keys of others are out of reach: this one means another record.
    mine = await helmr.sessions.open(started.session).input("notes").send({"text": "m"}, idempotency_key="k")
    assert mine.sequence == 2


async def test_a_correlation_id_is_given_and_no_other(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 1)
    _, secret = await _for_notes(helmr, started, correlation_id="pr-1")
    assert await ask(url, secret, _in(started), {"text": "a"}, Correlation_Id="pr-2") == _NO
    assert (await ask(url, secret, _in(started), {"text": "a"})).status == 200
    record = (await helmr.sessions.open(started.session).input("notes").list())[0]
    assert record.correlation_id == "pr-1"


async def test_strangers_learn_nothing(
    helmr: AsyncClient, url: str, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    started, other = await asyncio.gather(*(helmr.sessions.start("talk", 1) for _ in range(2)))
    access, secret = await _for_notes(helmr, started)
    read = (await helmr.access.for_output(started.session, "replies")).secret or ""
    used, used_up = await _for_notes(helmr, started, uses=1)
    assert (await ask(url, used_up, _in(started), {"text": "a"})).status == 200
    gone, revoked = await _for_notes(helmr, started)
    await helmr.access.revoke(gone)
    _, expired = await _for_notes(helmr, started, expires_in=0.001)
    note = {"text": "a"}
    wrong = [
        await ask(url, None, _in(started), note),
        await ask(url, "", _in(started), note),
        await ask(url, secret[:-1], _in(started), note),
        await ask(url, f"{access}.{read.partition('.')[2]}", _in(started), note),
        await ask(url, "x" * 10_000, _in(started), note),
        await ask(url, read, _in(started), note),
        await ask(url, secret, _in(other), note),
        await ask(url, secret, _in(started, "replies"), note),
        await ask(url, secret, _in(started, "*"), note),
        await ask(url, secret, _out(started)),
        await ask(url, secret, "POST /v1/tokens/tok_01m8f0000000000000000000/complete", note),
        await ask(url, used_up, _in(started), note),
        await ask(url, used_up, _in(started), {"not": "valid"}),
        await ask(url, revoked, _in(started), note),
        await ask(url, expired, _in(started), note),
    ]
    assert wrong == [_NO] * len(wrong)
    assert (await helmr.access.get(used)).status == "used_up"
    for stream in (RUNS, SESSIONS):
        assert not [body for body in await _stored(platform, stream) if secret.encode() in body]
    assert secret not in caplog.text


async def _stored(platform: Platform, stream: str) -> list[bytes]:
    js = platform.control.log.js
    last = (await js.stream_info(stream)).state.last_seq
    found = [await get_message(js, stream, ">", after=seq) for seq in range(last)]
    return [message[1] for message in found if message is not None]


async def test_pages_go_on_where_the_last_one_ended(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 5)
    notes = helmr.sessions.open(started.session).input("notes")
    for text in ("a1", "b2", "a3", "b4", "a5"):
        await notes.send({"text": text})
    await started.run.wait(timeout=60)
    made = await helmr.access.for_output(started.session, "replies", uses=3)
    first = await ask(url, made.secret, _out(started, "?limit=2"))
    assert first.status == 200
    assert [set(record) for record in first.body["records"]] == [{"id", "sequence", "data", "correlation_id", "at"}] * 2
    assert (first.body["end"], first.body["more"]) == (2, True)
    rest = await ask(url, made.secret, _out(started, "?after=2"))
    assert [record["data"]["echo"] for record in rest.body["records"]] == ["a3", "b4", "a5"]
    assert (await ask(url, made.secret, _out(started, "?after=5"))).body == {"records": [], "end": 5, "more": False}
    assert await ask(url, made.secret, _out(started)) == _NO
    only = await helmr.access.for_output(started.session, "replies", correlation_id="b")
    found = await ask(url, only.secret, _out(started))
    assert [record["sequence"] for record in found.body["records"]] == [2, 4]
    assert await ask(url, only.secret, _out(started, "?after=x")) == (
        400,
        {"error": "bad_request", "parameter": "after"},
    )
    assert (await ask(url, only.secret, _out(started).replace("GET", "HEAD"))).status == 405


async def _next(reader: asyncio.StreamReader) -> dict[str, str]:
    """The next event that has a name or data, out of the chunks that it comes in."""
    while True:
        size = int(await asyncio.wait_for(reader.readline(), 60), 16)
        text = (await reader.readexactly(size + 2)).decode()
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "data" in fields:
            return {name: value.strip() for name, value in fields.items()}


async def test_whoever_follows_hears_what_comes_and_loses_nothing_by_a_break(helmr: AsyncClient, url: str) -> None:
    started = await helmr.sessions.start("talk", 4)
    notes = helmr.sessions.open(started.session).input("notes")
    made = await helmr.access.for_output(started.session, "replies", uses=2)
    accept = "text/event-stream"
    async with asked(url, made.secret, _out(started), Accept=accept) as (status, reader):
        assert status == 200
        for text in ("one", "two"):
            await notes.send({"text": text})
            event = await _next(reader)
            assert json.loads(event["data"])["data"] == {"echo": text}
    await notes.send({"text": "three"})
    async with asked(url, made.secret, _out(started), Accept=accept, Last_Event_ID="2") as (_, reader):
        event = await _next(reader)
        assert (event["id"], json.loads(event["data"])["data"]) == ("3", {"echo": "three"})
        await helmr.access.revoke(made.access, reason="enough")
        assert (await _next(reader))["event"] == "end"
    assert await ask(url, made.secret, _out(started), Accept=accept) == _NO


async def test_whoever_follows_is_let_go_in_good_order_when_the_endpoint_stops(
    helmr: AsyncClient, platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    started = await helmr.sessions.start("talk", 1)
    made = await helmr.access.for_output(started.session, "replies")
    async with AsyncExitStack() as stack:
        serving_ = serving(Address("127.0.0.1", 0), platform.control.log, platform.control.streams)
        async with serving_ as url:
            follower = asked(url, made.secret, _out(started), Accept="text/event-stream")
            status, reader = await stack.enter_async_context(follower)
            assert status == 200
            await helmr.sessions.open(started.session).input("notes").send({"text": "one"})
            assert (await _next(reader))["id"] == "1"
        assert (await _next(reader))["event"] == "end"
    assert "graceful shutdown" not in caplog.text


async def test_a_token_is_completed_and_repeating_that_is_no_use(helmr: AsyncClient, url: str) -> None:
    token = (await helmr.tokens.create()).token
    started = await helmr.sessions.start("take", token.id)
    made = await helmr.access.for_token(token, uses=1)
    line = f"POST /v1/tokens/{token.id}/complete"
    other = (await helmr.tokens.create()).token
    assert await ask(url, made.secret, f"POST /v1/tokens/{other.id}/complete", 1) == _NO
    for _ in range(2):
        assert await ask(url, made.secret, line, {"a": 1}) == (200, {"status": "completed"})
    assert await started.run.result(timeout=60) == {"a": 1}
    assert (await helmr.access.get(made.access)).used == 1
    assert await ask(url, made.secret, line, {"a": 2}) == _NO
    unlimited = await helmr.access.for_token(token)
    assert await ask(url, unlimited.secret, line, {"a": 2}) == (409, {"error": "completed"})


async def test_only_what_is_there_can_be_allowed(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("talk", 1)
    with pytest.raises(NotFound, match="declares no input stream 'replies'"):
        await helmr.access.for_input(started.session, "replies")
    with pytest.raises(NotFound):
        await helmr.access.for_token("tok_01m8f0000000000000000000")
    for options in ({"uses": 0}, {"uses": 101}, {"expires_in": 0}, {"expires_in": "366d"}, {"note": "x" * 300}):
        with pytest.raises(UsageError):
            await helmr.access.for_input(started.session, "notes", **options)


async def test_the_history_lists_them_without_their_secrets(
    helmr: AsyncClient, platform: Platform, tmp_path: Path
) -> None:
    started = await helmr.sessions.start("talk", 1)
    made = [await helmr.access.for_input(started.session, "notes") for _ in range(3)]
    ids = [each.access.id for each in made]
    await helmr.access.revoke(ids[1], reason="lost")
    async with history(platform.nc, tmp_path / "h"):
        listed = await helmr.access.list(session=started.session)
        assert [each.id for each in listed] == ids[::-1]
        assert listed[1] == await helmr.access.get(ids[1])
        assert [each.id for each in await helmr.access.list(status="active", limit=2)] == [ids[2], ids[0]]
        assert (await helmr.access.revoke("@last")).id == ids[2]
        told = await helmr.query("SELECT status, reason FROM access WHERE id = $id", {"id": ids[1]})
        assert told == [{"status": "revoked", "reason": "lost"}]
        assert not any((each.secret or "")[30:] in str(listed) for each in made)


async def test_its_timer_ends_it(helmr: AsyncClient, platform: Platform) -> None:
    started = await helmr.sessions.start("talk", 1)
    heard = asyncio.Event()

    async def hear(_: object) -> None:
        heard.set()

    ended = subjects.live(helmr.scope, "access", kind="expired")
    subscription = await platform.nc.subscribe(ended, cb=hear)
    made = await helmr.access.for_input(started.session, "notes", expires_in=0.2)
    await asyncio.wait_for(heard.wait(), 60)
    await subscription.unsubscribe()
    assert (await helmr.access.get(made.access)).status == "expired"


async def test_a_place_in_a_stream_is_found_by_number(helmr: AsyncClient, platform: Platform) -> None:
    started, other = await asyncio.gather(*(helmr.sessions.start("talk", 1) for _ in range(2)))
    here, there = (helmr.sessions.open(each.session).input("notes") for each in (started, other))
    for n in range(12):
        await (here if n % 3 else there).send({"text": str(n)})
    subject = subjects.io(helmr.scope, started.session.id, "in", "notes")
    js = platform.control.log.js
    for sequence in range(10):
        place = await records.place(js, subject, sequence)
        found = [stored.record.sequence async for stored in records.records(js, subject, after=place)]
        assert found == list(range(sequence + 1, 9))
