"""Payloads and outputs that are too large for an event: stored apart, and in their place wherever one run is looked at."""

from __future__ import annotations

import msgspec
import pytest

from bus import topology
from bus.artifacts import digest_of, open_artifacts
from bus.garbage import Garbage
from bus.log import RUN
from bus.versions import Versions
from helmr.client import AsyncClient
from helmr.errors import Conflict, PayloadInvalid, TooLarge
from helmr.events import INLINE_VALUE, MAX_VALUE, ArtifactRef
from helmr.models import ELSEWHERE
from helmr.subjects import Scope
from tests.integration.platform import Platform, history

pytestmark = pytest.mark.anyio

TASKS = """
    from dataclasses import dataclass
    from helmr import Retry, task

    @dataclass
    class Text:
        text: str

    @task("echo", retry=Retry(max_attempts=2, min_delay="0s"))
    def echo(payload: Text, ctx) -> dict:
        if ctx.attempt == 1 and payload.text.startswith("again"):
            raise ValueError("once more")
        return {"text": payload.text}

    @task("as-it-is")
    def as_it_is(payload):
        return payload
"""

LARGE = "again " + "größer " * (INLINE_VALUE // 6)


async def test_a_large_value_is_in_its_place_wherever_one_run_is_looked_at(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("echo", {"text": LARGE})
    assert started.run.record.payload.keys() == {ELSEWHERE}
    assert await started.run.result(timeout=30) == {"text": LARGE}
    run = await helmr.runs.get(started.run)
    assert (run.payload, run.output, run.attempt) == ({"text": LARGE}, {"text": LARGE}, 2)
    assert run.output_artifact is not None
    size = len(msgspec.json.encode({"text": LARGE}))
    assert run.output_artifact.bytes == size > INLINE_VALUE
    end = (await history(helmr, run))[-1]
    assert msgspec.convert(end.data["output_artifact"], ArtifactRef) == run.output_artifact
    assert "output" not in end.data


async def test_a_value_of_ordinary_size_is_in_the_event(helmr: AsyncClient) -> None:
    lookalike = {ELSEWHERE: {"digest": "0" * 64, "bytes": 1}}
    run = await (await helmr.sessions.start("as-it-is", lookalike)).run.wait(timeout=30)
    assert (run.payload, run.output, run.output_artifact) == (lookalike, lookalike, None)


async def test_what_is_wrong_with_a_large_payload_is_said_at_the_start(helmr: AsyncClient) -> None:
    with pytest.raises(TooLarge, match="limit is"):
        await helmr.sessions.start("echo", {"text": "x" * MAX_VALUE})
    with pytest.raises(PayloadInvalid, match="text"):
        await helmr.sessions.start("echo", {"text": [LARGE]})


async def test_a_large_start_is_one_start_however_often_it_is_made(helmr: AsyncClient) -> None:
    first = await helmr.sessions.start("as-it-is", [LARGE], external_id="once")
    again = await helmr.sessions.start("as-it-is", [LARGE], external_id="once")
    assert (again.run.id, again.reused) == (first.run.id, True)
    with pytest.raises(Conflict):
        await helmr.sessions.start("as-it-is", [LARGE, LARGE], external_id="once")
    assert await first.run.result(timeout=30) == [LARGE]


async def test_what_the_log_still_refers_to_is_no_garbage(platform: Platform, helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("as-it-is", LARGE)).run.wait(timeout=30)
    store = open_artifacts(platform.nc, topology.VERSIONS)
    garbage = Garbage(platform.nc, Versions(store), min_age=0.0)
    assert run.output_artifact is not None
    digest = run.output_artifact.digest
    unused = {each.digest for each in (await garbage.find()).garbage}
    assert digest not in unused
    assert unused, "the parts that the payload was sent in"
    scope = Scope(*helmr.scope)
    for sequence in await platform.control.log.sequences(RUN, scope, run.id, before=10**9):
        await platform.nc.jetstream().delete_msg(topology.RUNS, sequence)
    found = await garbage.find()
    assert digest in {each.digest for each in found.garbage}
    await garbage.remove(found)
    assert not await store.has(digest)


async def test_a_payload_that_is_refused_leaves_no_more_than_its_parts(platform: Platform, helmr: AsyncClient) -> None:
    store = open_artifacts(platform.nc, topology.VERSIONS)
    wrong = {"text": [LARGE, "refused"]}
    with pytest.raises(PayloadInvalid):
        await helmr.sessions.start("echo", wrong)
    assert not await store.has(digest_of(msgspec.json.encode(wrong)))
