"""What a run writes: live, in order, whole, whatever bytes they are and however many."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from typing import Any

import pytest

from helmr.chunks import LogChunk
from helmr.client import AsyncClient
from tests.integration.platform import until, written
from worker import log_pump

pytestmark = pytest.mark.anyio

TASKS = """
    import os, subprocess, sys, time
    from helmr import logger, task

    @task("interleaved")
    def interleaved(payload: dict):
        for n in range(payload["lines"]):
            print(f"out {n}", flush=True)
            print(f"err {n}", file=sys.stderr, flush=True)
            logger.info(f"log {n}", n=n)

    @task("live")
    def live():
        for n in range(5):
            print(n, flush=True)
            time.sleep(0.3)

    @task("one-line")
    def one_line(payload: dict):
        sys.stdout.write("x" * payload["size"])
        sys.stdout.write("|")

    @task("bytes")
    def raw():
        sys.stdout.buffer.write(bytes(range(256)) * 300)
        sys.stdout.buffer.flush()
        os.write(2, b"\\xff\\xfe\\x00")

    @task("flood")
    def flood(payload: dict):
        block = b"y" * 65535 + b"\\n"
        for _ in range(payload["mib"] * 16):
            os.write(1, block)
        os.write(2, b"the end")

    @task("child")
    def child():
        subprocess.run([sys.executable, "-c", "print('from the child')"], check=True)

    @task("forks")
    def forks():
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(60)
            print("never")
            os._exit(0)
        print("forked", flush=True)
        return pid

    @task("last-words")
    def last_words():
        sys.stdout.write("no newline")
        raise SystemExit(2)
"""


async def _finish(helmr: AsyncClient, task: str, payload: Any = None) -> tuple[Any, dict[str, bytes]]:
    started = await helmr.sessions.start(task, payload)
    run = await started.run.wait(timeout=60)
    return run, await written(helmr, run)


async def test_three_streams_each_stay_in_order(helmr: AsyncClient) -> None:
    run, said = await _finish(helmr, "interleaved", {"lines": 200})
    assert run.status == "succeeded"
    assert said["stdout"] == b"".join(b"out %d\n" % n for n in range(200))
    assert said["stderr"] == b"".join(b"err %d\n" % n for n in range(200))
    lines = [json.loads(line) for line in said["log"].splitlines()]
    assert [line["message"] for line in lines] == [f"log {n}" for n in range(200)]
    assert all(line["level"] == "info" and line["fields"] == {"n": n} and line["at"] for n, line in enumerate(lines))


async def test_a_logger_line_comes_after_what_was_printed_before_it(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("interleaved", {"lines": 50})
    seen = {"stdout": 0, "log": 0}
    async for chunk in started.run.logs():
        if chunk.stream in seen:
            seen[chunk.stream] += chunk.data.count(b"\n")
        assert seen["log"] <= seen["stdout"]
    assert seen == {"stdout": 50, "log": 50}


async def test_output_arrives_while_the_task_runs(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("live")
    arrivals = [(time.monotonic(), chunk.data, chunk.at) async for chunk in started.run.logs()]
    assert b"".join(data for _, data, _ in arrivals) == b"0\n1\n2\n3\n4\n"
    assert arrivals[-1][0] - arrivals[0][0] > 0.9


async def test_following_late_gives_everything(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("live")
    await until(helmr, started.run, "started")
    await asyncio.sleep(0.4)
    first, second = await asyncio.gather(*(written(helmr, started.run, follow=True) for _ in range(2)))
    assert first == second == await written(helmr, started.run)
    assert first["stdout"] == b"0\n1\n2\n3\n4\n"


async def test_one_stream_can_be_asked_for(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("interleaved", {"lines": 3})
    followed = [chunk async for chunk in helmr.runs.logs(started.run, stream="stderr", follow=True)]
    stored = [chunk async for chunk in helmr.runs.logs(started.run, stream="stderr", attempt=1)]
    for chunks in (followed, stored):
        assert {chunk.stream for chunk in chunks} == {"stderr"}
        assert b"".join(chunk.data for chunk in chunks) == b"err 0\nerr 1\nerr 2\n"
    assert [chunk async for chunk in helmr.runs.logs(started.run, attempt=2)] == []


async def test_a_line_of_five_megabytes_arrives_whole(helmr: AsyncClient) -> None:
    run, said = await _finish(helmr, "one-line", {"size": 5_000_000})
    assert run.status == "succeeded"
    assert said["stdout"] == b"x" * 5_000_000 + b"|"


async def test_bytes_that_are_no_text_arrive_as_they_are(helmr: AsyncClient) -> None:
    run, said = await _finish(helmr, "bytes")
    assert run.status == "succeeded"
    assert said["stdout"] == bytes(range(256)) * 300
    assert said["stderr"] == b"\xff\xfe\x00"


async def test_what_children_write_belongs_to_the_run(helmr: AsyncClient) -> None:
    _, said = await _finish(helmr, "child")
    assert said["stdout"] == b"from the child\n"


async def test_last_words_without_a_newline_are_kept(helmr: AsyncClient) -> None:
    run, said = await _finish(helmr, "last-words")
    assert (run.exit_code, said["stdout"]) == (2, b"no newline")


async def test_a_task_that_forks_and_returns_takes_its_children_along(helmr: AsyncClient) -> None:
    begun = time.monotonic()
    run, said = await _finish(helmr, "forks")
    assert run.status == "succeeded"
    assert said["stdout"] == b"forked\n"
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(run.output, 0)


@pytest.mark.slow
async def test_a_flood_is_cut_at_the_limit_in_bounded_memory(helmr: AsyncClient) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = await helmr.sessions.start("flood", {"mib": 200})
    stored, tombstones = {"stdout": 0, "stderr": 0}, []
    run = await started.run.wait(timeout=60)
    async for chunk in helmr.runs.logs(run):
        stored[chunk.stream] += len(chunk.data)
        tombstones += [chunk] if chunk.tombstone else []
    assert run.status == "succeeded"
    assert stored["stdout"] == log_pump.LIMIT == 64 * 1024**2
    assert {(chunk.stream, chunk.tombstone) for chunk in tombstones} >= {("stdout", "truncated")}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150 * 1024, f"{grown} KiB more than before"
    last = (await helmr.runs.events.list(run))[-1]
    assert last.data["logs"] == {"stdout": 200 * 1024**2, "stderr": 7, "log": 0, "truncated": True}


async def test_chunks_are_of_a_bounded_size_and_gapless(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("one-line", {"size": 1_000_000})
    await started.run.wait(timeout=30)
    chunks: list[LogChunk] = [chunk async for chunk in helmr.runs.logs(started.run)]
    assert max(len(chunk.data) for chunk in chunks) <= log_pump.CHUNK
    ends = [chunk.offset + len(chunk.data) for chunk in chunks]
    assert [chunk.offset for chunk in chunks] == [0, *ends[:-1]]
