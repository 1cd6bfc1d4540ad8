"""The child process that runs a user's SQL: it parses and checks it, runs it over a read-only copy, and streams the rows.

What a hostile query could do is bounded three times over: by the guard, by DuckDB's own settings on a read-only file
without access to any other, and by the operating system (:mod:`store.confinement`). The process has an empty environment and
ends with its parent. In-process limits alone do not hold: with ``memory_limit`` at 1 GB a single value reached 6 GB.

It is spoken to over its standard input and output in frames: 4 bytes of length, 1 byte of kind, then the body.
"""

# ruff: noqa: S608  # the user's own SQL it is, and names that are quoted

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import select
import struct
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any, Literal, NamedTuple

import duckdb
import msgspec
import pyarrow.ipc as arrow_ipc
import pyarrow.lib as pa

from helmr.errors import HelmrError, TimedOut, UsageError
from store import sql_guard
from store.confinement import confine
from store.exposure import MEMORY, Source, connection
from store.question import Parameter, Summary
from store.sandbox_json import json_lines

#: Kinds of frames.
REQUEST, CHECKED, DATA, END, ERROR = b"Q", b"C", b"D", b"E", b"X"
HEADER = struct.Struct(">Ic")

#: Seconds after which files that nobody asks about any more are closed, and with them what is kept of them in memory.
_KEEP = 30.0
_CHUNK = 512 * 1024
_ROWS_PER_BATCH = 4096
_NO_MEMORY = re.compile(r"bad_alloc|malloc|memory allocation", re.IGNORECASE)
#: Characters of DuckDB's own error text that are read and passed on.
_ERROR_LENGTH = 4000


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent asks: first ``check``, and then, with the copies that takes, ``run``."""

    verb: Literal["check", "run"]
    sql: str
    parameters: dict[str, Parameter] = {}
    source: Source = Source()
    format: Literal["arrow", "json"] = "arrow"
    max_rows: int = 0
    max_bytes: int = 0
    seconds: float = 0.0


class CheckedReply(msgspec.Struct, frozen=True, kw_only=True):
    """A statement that may run, and the tables it reads."""

    sql: str
    tables: list[str]


def _limit_cpu(seconds: float) -> None:
    """Both cores for the whole time, and no more; the hard limit stays open for the next query."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = int(used.ru_utime + used.ru_stime + 2 * seconds + 2)
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))


class Pipe:
    """Frames over a pair of binary files."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._source = source
        self._sink = sink

    def wait(self, seconds: float) -> bool:
        """Wait for a frame, after the last one has been answered; whether one comes."""
        return bool(select.select([self._source], [], [], seconds)[0])

    def read(self) -> bytes | None:
        """The body of the next frame; None at the end."""
        head = self._source.read(HEADER.size)
        if len(head) < HEADER.size:
            return None
        length, _ = HEADER.unpack(head)
        return self._source.read(length)

    def write(self, kind: bytes, body: bytes) -> None:
        """Send a frame."""
        self._sink.write(HEADER.pack(len(body), kind))
        self._sink.write(body)
        self._sink.flush()


class _Chunks(io.RawIOBase):
    """Collects what is written into frames of half a megabyte; stops at the byte cap."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._held = bytearray()
        self.total = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = bytes(data)
        self._held += view
        self.total += len(view)
        while len(self._held) >= _CHUNK:
            self._pipe.write(DATA, bytes(self._held[:_CHUNK]))
            del self._held[:_CHUNK]
        return len(view)

    def finish(self) -> None:
        """Send what is left."""
        if self._held:
            self._pipe.write(DATA, bytes(self._held))
            self._held.clear()


def _with_types(result: Result) -> pa.Schema:
    """The Arrow schema, each column with its DuckDB type beside it: of JSON, Arrow only knows that it is text."""
    fields = zip(result.rows.schema, result.columns, strict=True)
    return pa.schema([field.with_metadata({"duckdb_type": kind}) for field, (_, kind) in fields])


class Sandbox:
    """Serves one parent, one task at a time.

    Opening the files takes longer than most queries, so that they stay open for the next query over the same ones.
    """

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self._parser = duckdb.connect(":memory:", config={"enable_external_access": False, "lock_configuration": True})
        self._open: tuple[Source, duckdb.DuckDBPyConnection] | None = None

    def serve(self) -> None:
        """Answer tasks until the parent closes the pipe."""
        while (body := self._next()) is not None:
            task = msgspec.json.decode(body, type=Task)
            try:
                if task.verb == "check":
                    self._check(task)
                else:
                    self._run(task)
            except HelmrError as error:
                self.pipe.write(ERROR, msgspec.json.encode(error.to_dict()))
            except (duckdb.Error, MemoryError, pa.ArrowException) as error:
                told = explain(error, task)
                if not isinstance(told, UsageError):  # whatever it took all memory or time with goes, too
                    self._close()
                self.pipe.write(ERROR, msgspec.json.encode(told.to_dict()))

    def _next(self) -> bytes | None:
        if self._open is not None and not self.pipe.wait(_KEEP):
            self._close()
        return self.pipe.read()

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def _cursor(self, source: Source) -> duckdb.DuckDBPyConnection:
        """A cursor for one query, which can leave nothing behind for the next."""
        if self._open is None or self._open[0] != source:
            self._close()
            self._open = source, connection(source)
        cursor = self._open[1].cursor()
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        return cursor

    def _check(self, task: Task) -> None:
        found = sql_guard.check(task.sql, sql_guard.duckdb_parser(self._parser.execute), task.parameters)
        self.pipe.write(CHECKED, msgspec.json.encode(CheckedReply(sql=found.sql, tables=sorted(found.tables))))

    def _run(self, task: Task) -> None:
        _limit_cpu(task.seconds)
        cursor = self._cursor(task.source)
        alarm = threading.Timer(task.seconds, cursor.interrupt)
        alarm.daemon = True
        alarm.start()
        try:
            summary = self._send(task, execute(cursor, task.sql, task.parameters))
        finally:
            alarm.cancel()
            cursor.close()
        self.pipe.write(END, msgspec.json.encode(summary))

    def _send(self, task: Task, result: Result) -> Summary:
        chunks = _Chunks(self.pipe)
        rows, truncated = 0, None
        with _writer(task.format, chunks, result) as write:
            for batch in result.rows:
                kept = batch.slice(0, task.max_rows - rows)
                write(kept)
                rows += kept.num_rows
                if kept.num_rows < batch.num_rows:
                    truncated = "rows"
                elif chunks.total >= task.max_bytes:
                    truncated = "bytes"
                if truncated:
                    break
        chunks.finish()
        return Summary(rows=rows, truncated=truncated)


@contextlib.contextmanager
def _writer(kind: str, sink: _Chunks, result: Result) -> Iterator[Any]:
    if kind == "json":
        yield json_lines(sink, result.columns)
    else:
        told = _with_types(result)
        with arrow_ipc.new_stream(sink, told) as stream:
            yield lambda batch: stream.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=told))


class Result(NamedTuple):
    """The rows of a query, as they come, and the names and DuckDB types of its columns."""

    columns: list[tuple[str, str]]
    rows: pa.RecordBatchReader


def execute(con: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Parameter]) -> Result:
    """Start a query; VARIANT columns come as JSON, for no client knows them."""
    values = parameters or None
    try:
        relation = con.sql(sql, params=values)
    except duckdb.Error:
        con.execute(sql, values)  # fails likewise, but tells line and place, which the relation does not
        raise
    shape = [(name, str(kind)) for name, kind in zip(relation.columns, relation.types, strict=True)]
    if any("VARIANT" in kind for _, kind in shape):
        relation = con.sql(_without_variants(sql, shape), params=values)
        shape = [(name, str(kind)) for (name, _), kind in zip(shape, relation.types, strict=True)]
    return Result(shape, relation.to_arrow_reader(_ROWS_PER_BATCH))


def _without_variants(sql: str, shape: list[tuple[str, str]]) -> str:
    """By position, because a query may give several columns one name."""
    picked = [
        f"c{at}::JSON AS {_identifier(name)}" if "VARIANT" in kind else f"c{at} AS {_identifier(name)}"
        for at, (name, kind) in enumerate(shape)
    ]
    names = ", ".join(f"c{at}" for at in range(len(shape)))
    return f"SELECT {', '.join(picked)} FROM (\n{sql}\n) AS q({names})"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def explain(error: Exception, task: Task) -> HelmrError:
    """The error a person can act on; its text is cut off, because a query can make it as long as it likes."""
    told = str(error)[:_ERROR_LENGTH]
    if isinstance(error, duckdb.InterruptException) or "INTERRUPT" in told:
        return TimedOut(f"the query took longer than {task.seconds:g} s", hint="ask for less, or raise --timeout")
    if isinstance(error, MemoryError | duckdb.OutOfMemoryException) or _NO_MEMORY.search(told):
        return HelmrError(
            f"the query needs more than {MEMORY} of memory", hint="select fewer rows or columns, or aggregate"
        )
    head, _, rest = told.partition("\n")
    found = re.search(r"^LINE \d+: .*\n\s*\^+", told, re.MULTILINE)
    hints = [
        line.strip() for line in rest.splitlines() if line.strip().startswith(("Did you mean", "Candidate", "HINT"))
    ]
    if "Malformed JSON" in head and "Input: \"{'" in told:
        hints = ["events.data is a VARIANT: read a field as data.name, or as (data::JSON)->>'name'"]
    message = re.sub(r"^[A-Z][A-Za-z ]+ Error: ", "", head)
    return UsageError(
        message,
        hint=hints[0] if hints else None,
        details={"excerpt": found.group()} if found else {"duckdb": told[:2000]},
    )


def main() -> None:
    """Serve the parent on standard input and output."""
    # The pipe to the parent is kept for frames alone: whatever else writes to standard output goes to standard error.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    confine()
    Sandbox(Pipe(sys.stdin.buffer, sink)).serve()


if __name__ == "__main__":
    main()
