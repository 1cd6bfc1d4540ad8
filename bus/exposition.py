"""Serves metrics to Prometheus over HTTP. Needs the optional package ``prometheus-client``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bus.metrics import Histogram, Metric, Reading, Values
from helmr.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

#: Seconds that collecting may take, before the scrape fails.
_PATIENCE = 8.0
_HOST = "127.0.0.1"


class Address(NamedTuple):
    """Where metrics are served."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """An address from ``PORT`` or ``HOST:PORT``; without a host only this machine can ask.

        Raises:
            UsageError: it is neither.
        """
        host, _, port = text.rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            raise UsageError(
                f"{text!r} is not PORT or HOST:PORT", hint="e.g. --metrics 9400, or --metrics 0.0.0.0:9400"
            )
        return cls(host.strip("[]") or _HOST, int(port))


@asynccontextmanager
async def serving(address: Address, read: Callable[[], Awaitable[Reading]]) -> AsyncIterator[str]:
    """Serve what ``read`` tells, and the process's own metrics, for the length of a block; the URL.

    Raises:
        ConfigError: the package is not installed, or the address cannot be listened on.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.process_collector import ProcessCollector
    except ImportError as error:
        raise ConfigError("metrics need the package prometheus-client", hint="pip install 'helmr[metrics]'") from error
    registry = CollectorRegistry()
    registry.register(_collector(asyncio.get_running_loop(), read))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        hint = "choose another port, or the address of this machine"
        raise ConfigError(
            f"cannot serve metrics at {address.host}:{address.port}: {error.strerror}", hint=hint
        ) from error
    try:
        yield f"http://{address.host}:{server.server_port}/metrics"
    finally:
        await asyncio.to_thread(_close, server, thread)


def _close(server: Any, thread: Any) -> None:
    server.shutdown()
    server.server_close()
    thread.join()


def _collector(loop: asyncio.AbstractEventLoop, read: Callable[[], Awaitable[Reading]]) -> Collector:
    from prometheus_client.registry import Collector

    async def reading() -> Reading:
        return await read()

    class FromLoop(Collector):
        """Scrapes come in threads of the HTTP server; the values are the loop's."""

        def collect(self) -> Iterator[Any]:
            work = asyncio.run_coroutine_threadsafe(reading(), loop)
            try:
                found = work.result(_PATIENCE)
            finally:
                work.cancel()
            return (_family(metric, values) for metric, values in found)

        def describe(self) -> Iterator[Any]:
            return iter(())

    return FromLoop()


def _family(metric: Metric, values: Values) -> Any:
    from prometheus_client import core

    made = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "histogram": core.HistogramMetricFamily,
    }[metric.kind]
    family: Any = made(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        if isinstance(value, Histogram):
            family.add_metric(labels, buckets=value.cumulative(), sum_value=value.total)
        else:
            family.add_metric(labels, value)
    return family
