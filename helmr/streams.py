"""Named streams of a session, declared at module level: outputs that tasks append to, inputs that others send to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helmr import jsonform, registry, runtime
from helmr.convert import from_builtins
from helmr.declarations import checked_name
from helmr.errors import TooLarge, UsageError
from helmr.jsonform import ConversionError, to_builtins
from helmr.registry import Location, caller_location

#: One record, in bytes of JSON.
RECORD_LIMIT = 256 * 1024


@dataclass(frozen=True)
class OutputStream:
    """A stream of records from the task to whoever reads the session."""

    name: str
    schema: Any = None
    location: Location = field(default=Location("", 0), repr=False, compare=False)

    def append(self, data: Any, correlation_id: str | None = None) -> None:
        """Append one record.

        Raises:
            UsageError: the data is not JSON or does not fit the stream's schema, or there is no run.
            TooLarge: the record exceeds 256 KiB.
        """
        run = runtime.required(f"streams.output({self.name!r}).append")
        record = self._record(data)
        size = len(jsonform.encode(record))
        if size > RECORD_LIMIT:
            raise TooLarge(
                f"a record for the stream {self.name!r} has {size:,} bytes, more than {RECORD_LIMIT >> 10} KiB",
                hint="write it to a file in the workspace and append its path",
            )
        message = {"op": "output", "stream": self.name, "data": record}
        run.send(message if correlation_id is None else {**message, "correlation_id": correlation_id})

    def _record(self, data: Any) -> Any:
        try:
            record = to_builtins(data)
            if self.schema is not None:
                from_builtins(record, self.schema)
        except ConversionError as failure:
            raise UsageError(f"a record does not fit the stream {self.name!r}: {failure}") from None
        return record


@dataclass(frozen=True)
class InputStream:
    """A stream of records from outside to the session; this version only declares it."""

    name: str
    schema: Any = None
    location: Location = field(default=Location("", 0), repr=False, compare=False)


def output(name: str, schema: Any = None) -> OutputStream:
    """Declare an output stream.

    Args:
        schema: the type of its records: dataclass, TypedDict, msgspec.Struct, pydantic model, or builtins. None: any JSON.

    Raises:
        ProjectError: not a name, or another stream of this name differs.
    """
    place = caller_location()
    stream = OutputStream(checked_name("stream", name, place), schema, place)
    registry.declare("stream", registry.streams, name, stream, place)
    return stream


def input(name: str, schema: Any = None) -> InputStream:  # noqa: A001  streams.input is the name authors know
    """Declare an input stream; arguments and errors as for :func:`output`."""
    place = caller_location()
    stream = InputStream(checked_name("stream", name, place), schema, place)
    registry.declare("stream", registry.streams, name, stream, place)
    return stream
