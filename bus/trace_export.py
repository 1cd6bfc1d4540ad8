"""Tells an OpenTelemetry collector of every run that has ended. Needs the optional packages of ``helmr[otel]``.

A durable consumer follows the ends of runs, from the first time it was asked for; an end is acknowledged when the collector has
its spans. One that is away loses nothing: it gets them when it is back, and twice at worst, as the same spans.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import nats.errors

from bus import topology
from bus.log import RUN, Log
from bus.pull import Delivery, Puller, ensure_consumer
from bus.traces import Span, spans
from helmr import subjects, trace_ids
from helmr.errors import ConfigError, HelmrError, NotFound
from helmr.events import RunEvent
from helmr.subjects import Scope
from helmr.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

_BATCH = 16
#: Events of a run that are read, at most: the rest of a longer one would be journal.
_MOST_EVENTS = 20_000
_RETRY_DELAY = 1.0
#: Seconds until a run that the collector did not take is told again: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 300.0
#: Tries after which a run is given up: some nine hours.
TRIES = 100
_PATH = "/v1/traces"


def exporter(endpoint: str) -> SpanExporter:
    """What sends spans to a collector, by OTLP over HTTP; the usual ``OTEL_EXPORTER_OTLP_HEADERS`` and the like apply.

    Raises:
        ConfigError: the packages are not installed, or the endpoint is no URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp {endpoint!r} is no URL", hint="e.g. --otlp http://127.0.0.1:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError("traces need the packages of OpenTelemetry", hint="pip install 'helmr[otel]'") from error
    url = endpoint.rstrip("/")
    return OTLPSpanExporter(endpoint=url if url.endswith(_PATH) else url + _PATH)


class TraceExport:
    """Follows the ends of runs; run :meth:`run` in a task of its own."""

    def __init__(self, event_log: Log, exporter: SpanExporter) -> None:
        self._log = event_log
        self._exporter = exporter

    async def run(self) -> None:
        """Tell for ever."""
        try:
            while True:
                try:
                    await self._follow()
                except (HelmrError, nats.errors.Error) as error:
                    log.info("traces: starting over: %s", error)
                    await asyncio.sleep(_RETRY_DELAY)  # the server is away
        finally:
            self._exporter.shutdown()

    async def _follow(self) -> None:
        config = topology.trace_consumer()
        await ensure_consumer(self._log.nc, topology.RUNS, config.as_dict())
        async with Puller(self._log.nc, topology.RUNS, config.durable_name or "") as puller:
            while True:
                async for item in puller.pull(_BATCH):
                    await self._tell(item)

    async def _tell(self, item: Delivery) -> None:
        parsed = subjects.parse_event(item.msg.subject)
        try:
            told = await self.tell(parsed.scope, parsed.id)
        except NotFound:  # its events have been deleted since: there is nothing left to tell
            told = True
        if told:
            await item.msg.ack()
        elif item.delivered >= TRIES:
            log.warning("%s: the collector has refused its spans %s times; given up", parsed.id, TRIES)
            await item.msg.ack()
        else:
            await item.msg.nak(delay=min(_FIRST_WAIT * 2 ** min(item.delivered, 10), _LONGEST_WAIT))

    async def tell(self, scope: Scope, run_id: str) -> bool:
        """Send the spans of a run that has ended; whether the collector took them.

        Raises:
            NotFound: its events are not there any more.
        """
        from opentelemetry.sdk.trace.export import SpanExportResult

        made = readable(run_id, spans(scope, await self._events(scope, run_id)))
        return await asyncio.to_thread(self._exporter.export, made) is SpanExportResult.SUCCESS

    async def _events(self, scope: Scope, run_id: str) -> list[RunEvent]:
        found = await self._log.events(RUN, scope, run_id, limit=_MOST_EVENTS)
        if not found or found[0].cursor != 1:
            raise NotFound(f"the log no longer has the beginning of {run_id}")
        return found if len(found) < _MOST_EVENTS else [*found, await self._log.present(RUN, scope, run_id)]


def readable(run_id: str, found: Sequence[Span]) -> list[ReadableSpan]:
    """Spans as OpenTelemetry's SDK exports them."""
    from opentelemetry.sdk.resources import Resource

    resource = Resource({"service.name": "helmr", "service.version": __version__})
    context = _contexts(run_id)
    return [_readable(span, resource, context) for span in found]


def _contexts(run_id: str) -> Callable[[int], Any]:
    from opentelemetry.trace import SpanContext, TraceFlags

    trace = trace_ids.trace_id(run_id)
    flags = TraceFlags(TraceFlags.SAMPLED)
    return lambda span_id: SpanContext(trace, span_id, is_remote=False, trace_flags=flags)


def _readable(span: Span, resource: Any, context: Callable[[int], Any]) -> ReadableSpan:
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Status, StatusCode

    return ReadableSpan(
        span.name,
        context=context(span.span_id),
        parent=context(span.parent) if span.parent is not None else None,
        resource=resource,
        attributes=span.attributes,
        events=[Event(each.name, each.attributes, _nanoseconds(each.at)) for each in span.events],
        status=Status(StatusCode.ERROR, span.error) if span.error is not None else Status(StatusCode.UNSET),
        start_time=_nanoseconds(span.begin),
        end_time=_nanoseconds(span.end),
        instrumentation_scope=InstrumentationScope("helmr", __version__),
    )


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000) * 1000
