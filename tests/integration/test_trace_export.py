"""Runs as a collector hears of them, over OTLP on this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bus.trace_export import TraceExport, exporter
from helmr import trace_ids
from helmr.client import AsyncClient
from helmr.errors import ConfigError
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio

TASKS = """
    import os
    from helmr import task

    @task("fine")
    def fine():
        return os.environ["TRACEPARENT"]

    @task("broken")
    def broken():
        raise ValueError("no")
"""


class Collector:
    """Takes spans; refuses them while ``away``. ``told`` are all of them, as often as they came."""

    def __init__(self) -> None:
        self.away = False
        self.told: list[tuple[str, str, str, str]] = []
        self.refused = threading.Event()
        self.url = ""
        self._lock = threading.Lock()

    def take(self, body: bytes) -> bool:
        """A request; whether it is accepted."""
        if self.away:
            self.refused.set()
            return False
        with self._lock:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        parent = span.parent_span_id.hex()
                        self.told.append((span.trace_id.hex(), span.span_id.hex(), parent, span.name))
        return True

    def of(self, run_id: str) -> list[tuple[str, str, str]]:
        """Id, parent and name of the spans of a run."""
        trace = f"{trace_ids.trace_id(run_id):032x}"
        with self._lock:
            return [tuple(span[1:]) for span in self.told if span[0] == trace]  # type: ignore[misc]

    async def hears_of(self, run_id: str) -> list[tuple[str, str, str]]:
        """The same, as soon as there are any."""
        async with asyncio.timeout(30):
            while not (found := self.of(run_id)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # it comes in a thread of the HTTP server
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            # 400: a refusal that the exporter does not try again by itself.
            self.send_response(200 if self.path == "/v1/traces" and collector.take(body) else 400)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Be silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@asynccontextmanager
async def exporting(platform: Platform, collector: Collector) -> AsyncIterator[TraceExport]:
    """The export, as the server runs it; it has its consumer when the block begins."""
    export = TraceExport(platform.control.log, exporter(collector.url))
    task = asyncio.create_task(export.run())
    try:
        async with asyncio.timeout(10):
            while True:
                names = [each.name for each in await platform.control.nc.jetstream().consumers_info("RUNS")]
                if "traces" in names:
                    break
                await asyncio.sleep(0.02)
        yield export
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_run_that_ended_is_told_as_spans(platform: Platform, helmr: AsyncClient) -> None:
    with collecting() as collector:
        async with exporting(platform, collector):
            run = (await helmr.sessions.start("fine")).run
            parent = await run.result()
            found = await collector.hears_of(run.id)
            broken = (await helmr.sessions.start("broken")).run
            await broken.wait()
            assert await collector.hears_of(broken.id)
    ids = {name: span for span, _, name in found}
    parents = {name: above for _, above, name in found}
    assert set(ids) == {"run fine", "queue", "lease", "prepare", "execute"}
    assert parents["run fine"] == ""
    assert parents["queue"] == parents["lease"] == ids["run fine"]
    assert parents["prepare"] == parents["execute"] == ids["lease"]
    assert parent == f"00-{trace_ids.trace_id(run.id):032x}-{ids['execute']}-01"


@pytest.mark.slow
async def test_a_collector_that_was_away_hears_of_it_later(platform: Platform, helmr: AsyncClient) -> None:
    with collecting() as collector:
        collector.away = True
        async with exporting(platform, collector):
            run = (await helmr.sessions.start("fine")).run
            await run.wait()
            await asyncio.to_thread(collector.refused.wait, 30)
            assert collector.of(run.id) == []
            collector.away = False
            assert len(await collector.hears_of(run.id)) == 5


async def test_telling_twice_names_the_same_spans(platform: Platform, helmr: AsyncClient) -> None:
    with collecting() as collector:
        async with exporting(platform, collector) as export:
            run = (await helmr.sessions.start("fine")).run
            await run.wait()
            once = await collector.hears_of(run.id)
            assert await export.tell(helmr.scope, run.id)
            twice = collector.of(run.id)
    assert sorted(twice) == sorted(once * 2)


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="no URL"):
        exporter("127.0.0.1:4318")
