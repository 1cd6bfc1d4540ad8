"""Ids of traces and spans, derived from a run's id: whoever tells of a run, and however often, names the same spans.

The format of what tasks get is that of W3C Trace Context, https://www.w3.org/TR/trace-context/#traceparent-header.
"""

from __future__ import annotations

from hashlib import sha256


def trace_id(run_id: str) -> int:
    """The trace of a run: 128 bits, never 0."""
    return _bits(run_id, 16)


def span_id(run_id: str, name: str) -> int:
    """A span of that trace: 64 bits, never 0; ``name`` is unique within the run."""
    return _bits(f"{run_id}/{name}", 8)


def execution(lease: int) -> str:
    """The name of the span in which the task's code runs under a lease, the one with this cursor."""
    return f"execute/{lease}"


def traceparent(run_id: str, lease: int) -> str:
    """What makes the task's own spans children of its execution under this lease; sampled."""
    return f"00-{trace_id(run_id):032x}-{span_id(run_id, execution(lease)):016x}-01"


def _bits(text: str, size: int) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:size]) or 1
