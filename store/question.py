"""A user's query as it is asked, within which limits, and how its result ended."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from helmr.errors import TooLarge, UsageError

#: Bytes of SQL text, and of its parameters: a list of 400,000 constants keeps DuckDB's planner busy beyond any interrupt.
MAX_SQL = 64 * 1024
#: Seconds a query may take, if the request does not say, and at most.
TIMEOUT, MAX_TIMEOUT = 30.0, 300.0
#: Rows of a result, if the request does not say, and at most.
ROWS, MAX_ROWS = 10_000, 5_000_000
MAX_BYTES = 256 * 1024**2

#: What a parameter of a query may be: a bound value, never a piece of SQL.
Scalar = str | int | float | bool | None
Parameter = Scalar | list[Scalar]


class QueryRequest(msgspec.Struct, kw_only=True):
    """A user's SQL, and values for its ``$name`` and ``?``; ``timeout`` in seconds, ``limit`` in rows.

    ``fresh: false`` may answer from a copy that was taken up to ten seconds ago, which is quicker while much happens.
    """

    sql: str
    parameters: dict[str, Parameter] = {}
    format: Literal["arrow", "json"] = "arrow"
    limit: int | None = None
    timeout: float | None = None
    fresh: bool = True

    def limits(self) -> tuple[float, int]:
        """Seconds and rows this query may take.

        Raises:
            UsageError: more is asked for than anybody may have.
            TooLarge: its parameters are.
        """
        seconds = TIMEOUT if self.timeout is None else self.timeout
        rows = ROWS if self.limit is None else self.limit
        if not (math.isfinite(seconds) and 0 < seconds <= MAX_TIMEOUT):
            raise UsageError(f"timeout is {seconds:g} s, not more than 0 and up to {MAX_TIMEOUT:g}")
        if len(msgspec.json.encode(self.parameters)) > MAX_SQL:
            raise TooLarge(f"the query's parameters are larger than {MAX_SQL} bytes")
        if not 0 <= rows <= MAX_ROWS:
            raise UsageError(f"limit is {rows}, not 0 to {MAX_ROWS}")
        return seconds, rows


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How a result ended: rows sent, and which cap cut it off, if any."""

    rows: int
    truncated: str | None = None
