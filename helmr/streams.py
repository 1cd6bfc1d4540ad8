"""Named streams of a session, declared at module level: outputs that tasks append to, inputs that others send to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from helmr import jsonform, registry, runtime
from helmr.convert import from_builtins
from helmr.declarations import checked_name
from helmr.durations import Duration, seconds
from helmr.errors import TooLarge, UsageError, WaitTimeout
from helmr.jsonform import ConversionError, to_builtins
from helmr.registry import Location, caller_location
from helmr.replay import Slot
from helmr.waiting import Request, wait, wait_async

#: One record, in bytes of JSON.
RECORD_LIMIT = 256 * 1024


@dataclass(frozen=True)
class OutputStream:
    """A stream of records from the task to whoever reads the session."""

    name: str
    schema: Any = None
    location: Location = field(default=Location("", 0), repr=False, compare=False)

    def append(self, data: Any, correlation_id: str | None = None) -> None:
        """Append one record; once, however often the task's code runs. (From inside of a step: whenever the step is executed.)

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
        message: dict[str, Any] = {"op": "output", "stream": self.name, "data": record}
        if correlation_id is not None:
            message["correlation_id"] = correlation_id
        with run.lock:
            if not runtime.in_step():  # a step may be tried again: what it appends is not counted
                slot = run.claim("output", self.name)
                if slot.entry is not None:
                    return
                message |= {"n": slot.n, "main": slot.main}
            run.send(message)

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
    """A stream of records from outside to the session. A record is consumed once: by one wait of one run of the session."""

    name: str
    schema: Any = None
    location: Location = field(default=Location("", 0), repr=False, compare=False)

    def wait(self, timeout: Duration | None = None, *, correlation_id: str | None = None) -> Any:
        """The next record nobody has consumed; the run waits for it, and holds nothing meanwhile.

        Args:
            timeout: how long, at most; None: for ever.
            correlation_id: take only a record that carries it, and leave others for others.

        Returns:
            The record's data, as an instance of the stream's schema.

        Raises:
            WaitTimeout: none came in time.
            ConcurrentWait: the run waits for something else already.
        """
        return self._typed(wait(self._key(correlation_id), self._request(timeout, correlation_id)))

    async def wait_async(self, timeout: Duration | None = None, *, correlation_id: str | None = None) -> Any:  # noqa: ASYNC109
        """:meth:`wait`, awaited."""
        return self._typed(await wait_async(self._key(correlation_id), self._request(timeout, correlation_id)))

    def once(self, timeout: Duration = 0, *, correlation_id: str | None = None) -> Any:
        """The next record, or None when none comes within ``timeout``; by default, none that is there already."""
        try:
            return self.wait(timeout, correlation_id=correlation_id)
        except WaitTimeout:
            return None

    async def once_async(self, timeout: Duration = 0, *, correlation_id: str | None = None) -> Any:  # noqa: ASYNC109
        """:meth:`once`, awaited."""
        try:
            return await self.wait_async(timeout, correlation_id=correlation_id)
        except WaitTimeout:
            return None

    def on(self, timeout: Duration | None = None, *, correlation_id: str | None = None) -> Iterator[Any]:
        """The records as they come, each waited for; ends when none comes for ``timeout``."""
        with suppress(WaitTimeout):
            while True:
                yield self.wait(timeout, correlation_id=correlation_id)

    async def on_async(
        self,
        timeout: Duration | None = None,  # noqa: ASYNC109
        *,
        correlation_id: str | None = None,
    ) -> AsyncIterator[Any]:
        """:meth:`on`, for ``async for``."""
        with suppress(WaitTimeout):
            while True:
                yield await self.wait_async(timeout, correlation_id=correlation_id)

    def peek(self, *, correlation_id: str | None = None) -> Any:
        """The record that a wait would get at once, without consuming it; None when there is none."""
        run = runtime.required(f"streams.input({self.name!r}).peek")
        slot = run.claim("peek", self._key(correlation_id))
        answer = slot.entry
        if answer is None:
            answer = run.ask(self._look(slot, correlation_id))
        return self._typed(answer["result"]) if answer["found"] else None

    async def peek_async(self, *, correlation_id: str | None = None) -> Any:
        """:meth:`peek`, awaited."""
        run = runtime.required(f"streams.input({self.name!r}).peek")
        slot = run.claim("peek", self._key(correlation_id))
        answer = slot.entry
        if answer is None:
            answer = await run.ask_async(self._look(slot, correlation_id))
        return self._typed(answer["result"]) if answer["found"] else None

    def _look(self, slot: Slot, correlation_id: str | None) -> dict[str, Any]:
        return {"op": "peek", **slot.key, "stream": self.name, "correlation_id": correlation_id}

    def _key(self, correlation_id: str | None) -> str:
        return self.name if correlation_id is None else f"{self.name}[{correlation_id}]"

    def _request(self, timeout: Duration | None, correlation_id: str | None) -> Request:
        limit = None if timeout is None else seconds(timeout, what="timeout")
        return {"kind": "stream", "stream": self.name, "correlation_id": correlation_id, "timeout": limit}

    def _typed(self, data: Any) -> Any:
        return data if self.schema is None else from_builtins(data, self.schema)


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
