"""Query results as JSON lines, for clients that do not load Arrow: a line of columns, then one array per row."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Protocol

import msgspec
import pyarrow.lib as pa


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> int:
        """Take the bytes."""
        ...


def json_lines(sink: Sink, columns: list[tuple[str, str]]) -> Callable[[pa.RecordBatch], None]:
    """Write ``{"columns": [{"name": …, "type": …}, …]}``; the function returned writes the rows of a batch.

    JSON columns are passed through as JSON, not as text that contains JSON.
    """
    head = {"columns": [{"name": name, "type": kind} for name, kind in columns]}
    sink.write(msgspec.json.encode(head) + b"\n")
    plain = [_json if kind == "JSON" else _plain for _, kind in columns]

    def write(batch: pa.RecordBatch) -> None:
        values = [[to(value) for value in column.to_pylist()] for to, column in zip(plain, batch.columns, strict=True)]
        if batch.num_rows:
            lines = [msgspec.json.encode(row) for row in zip(*values, strict=True)]
            sink.write(b"\n".join(lines) + b"\n")

    return write


def _json(value: str | None) -> msgspec.Raw | None:
    return None if value is None else msgspec.Raw(value.encode())


def _plain(value: Any) -> Any:
    """A value JSON can hold: whole decimals as integers, other decimals, infinities and NaN as text."""
    if value is None or isinstance(value, str | int | bytes | date | time | timedelta):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
