"""Metrics as Prometheus reads them: of a server's parts and a worker, over HTTP."""

from __future__ import annotations

import asyncio
import builtins
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bus.exposition import Address, serving
from bus.metrics import SERVER, Reading, ServerMetrics
from helmr.client import AsyncClient
from helmr.errors import ConfigError, NotFound
from tests.integration.platform import Platform
from worker.metrics import WORKER, WorkerMetrics

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("fine")
    def fine():
        pass

    @task("broken")
    def broken():
        raise ValueError("no")
"""

LOCAL = Address("127.0.0.1", 0)


async def scrape(read: Callable[[], Awaitable[Reading]]) -> dict[str, dict[tuple[str, ...], float]]:
    """What an HTTP client gets: samples by name, and by the values of their labels in order of their names."""
    async with serving(LOCAL, read) as url:

        def get() -> str:
            with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310  # our own
                text: str = answer.read().decode()
                return text

        text = await asyncio.to_thread(get)
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


async def test_the_server_tells_of_runs_workers_streams_and_requests(platform: Platform, helmr: AsyncClient) -> None:
    control = platform.control
    metrics = ServerMetrics(control.nc, control.live, control.presence, control.tally)
    await metrics.start()
    await control.nc.flush()
    for name in ("fine", "broken"):
        await (await helmr.sessions.start(name)).run.wait()
    with pytest.raises(NotFound):
        await helmr.sessions.start("nope")
    found = await scrape(metrics.read)
    scope = (helmr.scope.environment, helmr.scope.project)
    assert found["helmr_runs_ended_total"][*scope, "succeeded", "fine"] == 1
    assert found["helmr_runs_failed_total"]["task_error", *scope, "broken"] == 1
    assert found["helmr_dispatch_seconds_count"][scope] == 2
    assert found["helmr_slots"]["default",] >= found["helmr_workers"]["default",] >= 1
    assert found["helmr_stream_appended_total"]["RUNS",] > 4
    assert found["helmr_history_up"][()] == 0  # there is none here
    assert found["helmr_api_requests_total"]["ok", "session", "start"] >= 2
    assert found["helmr_api_requests_total"]["not_found", "session", "start"] >= 1
    assert "process_cpu_seconds_total" in found
    known = {metric.name for metric in SERVER}
    told = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in found}
    assert {name for name in told if name.startswith("helmr_")} <= known


async def test_a_worker_tells_of_its_slots_and_dispatches(platform: Platform, helmr: AsyncClient) -> None:
    worker = platform.workers[0].worker
    before = worker.dispatches.results["executed"]
    await (await helmr.sessions.start("fine")).run.wait()
    async with asyncio.timeout(10):
        while worker.dispatches.results["executed"] == before:  # noqa: ASYNC110  # settled a moment after the end is told
            await asyncio.sleep(0.01)
    found = await scrape(WorkerMetrics(worker).read)
    assert found["helmr_worker_slots"][()] == worker.slots.total
    assert found["helmr_worker_dispatches_total"]["executed",] == before + 1
    assert {name for name in found if name.startswith("helmr_")} <= {metric.name for metric in WORKER}


async def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="prometheus-client") as raised:
        async with serving(LOCAL, _nothing):
            pass
    assert raised.value.hint == "pip install 'helmr[metrics]'"


async def test_a_port_that_is_taken_is_told() -> None:
    async with serving(LOCAL, _nothing) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            async with serving(Address("127.0.0.1", port), _nothing):
                pass


async def _nothing() -> Reading:
    return []
