"""The JSON form of Python values: what payloads, outputs, records and metadata look like outside of the task.

JSON here is compact UTF-8 without NaN. Standard library only; ``msgspec.Struct`` and pydantic models convert themselves,
when the task's image has those libraries.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import enum
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from typing import Any

#: JSON readers recurse; nesting beyond this is a mistake, or a structure that contains itself.
MAX_DEPTH = 200
#: Python refuses to print integers beyond 4300 digits.
_MAX_INT_BITS = 14_000

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ConversionError(ValueError):
    """A value does not fit; the message names the place, e.g. ``items[2].name: expected text, got 3``."""

    def __init__(self, at: str, problem: str) -> None:
        super().__init__(f"{at}: {problem}" if at else problem)


def dumps(value: Any) -> str:
    """``value``, made of JSON builtins, as compact text.

    Raises:
        ValueError: it contains NaN or an infinity, which JSON does not have.
    """
    return _encoder.encode(value)


def encode(value: Any) -> bytes:
    """``value`` as UTF-8; a lone surrogate, which UTF-8 does not have, becomes ``?``."""
    return _encoder.encode(value).encode("utf-8", "replace")


def is_pydantic(kind: Any) -> bool:
    """Whether ``kind`` is a pydantic model or pydantic dataclass; imports nothing."""
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__") and "pydantic" in sys.modules


def is_of(kind: Any, module: str, name: str) -> bool:
    """Whether ``kind`` is the class ``name`` of a module, or derived from it.

    Imports nothing: each library that is loaded makes it dearer to fork the process of a run.
    """
    return isinstance(kind, type) and module in sys.modules and issubclass(kind, getattr(sys.modules[module], name, ()))


def is_struct(kind: Any) -> bool:
    """Whether ``kind`` is a ``msgspec.Struct``; imports nothing."""
    return is_of(kind, "msgspec", "Struct")


def below(at: str, name: str) -> str:
    """The place of the entry ``name`` of what is at ``at``, for messages."""
    return f"{at}.{name}" if at else name


def shown(value: Any, limit: int = 80) -> str:
    """``value`` as Python shows it, cut to ``limit`` characters, for messages."""
    try:
        text = repr(value)
    except Exception as failure:  # noqa: BLE001  a __repr__ may raise anything, and a message about it must not
        text = f"<{type(value).__name__} whose repr raised {type(failure).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def write_duration(span: timedelta) -> str:
    """ISO 8601: ``P1DT30S``, ``-PT0.5S``."""
    sign, span = ("-", -span) if span < timedelta() else ("", span)
    fraction = f"{span.microseconds:06d}".rstrip("0")
    clock = f"T{span.seconds}{'.' + fraction if fraction else ''}S" if span.seconds or fraction else ""
    days = f"{span.days}D" if span.days or not clock else ""
    return f"{sign}P{days}{clock}"


def to_builtins(value: Any, at: str = "") -> Any:
    """``value`` as JSON builtins: dict, list, str, int, float, bool, None.

    Times become RFC 3339, sets sorted lists where their items can be sorted, enums their values. A lone surrogate in a text
    becomes U+FFFD.

    Raises:
        ConversionError: something in it has no JSON form: bytes, NaN, an open file, a structure that contains itself.
    """
    return _plain(value, at, 0)


def _plain(value: Any, at: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ConversionError("", f"nested deeper than {MAX_DEPTH} levels, or contains itself")
    write = _WRITERS.get(type(value))
    if write is not None:
        return write(value, at)
    if isinstance(value, list | tuple | collections.deque):
        return [_plain(item, f"{at}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return _plain(_sorted(value), at, depth + 1)
    if isinstance(value, Mapping):
        return _plain_object(value.items(), at, depth)
    return _plain_instance(value, at, depth)


def _plain_object(items: Iterable[tuple[Any, Any]], at: str, depth: int) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in items:
        name = _plain_key(key, at)
        if name in plain:
            raise ConversionError(at, f"two keys become {name!r}")
        plain[name] = _plain(item, below(at, name), depth + 1)
    return plain


def _plain_key(key: Any, at: str) -> str:
    if isinstance(key, enum.Enum):
        key = key.value
    if isinstance(key, bool) or not (isinstance(key, str | int | date) or is_of(type(key), "uuid", "UUID")):
        raise ConversionError(at, f"{shown(key)} cannot be a JSON key")
    return _plain_text(key, at) if isinstance(key, str) else str(key)


def _plain_instance(value: Any, at: str, depth: int) -> Any:
    kind = type(value)
    if isinstance(value, enum.Enum):
        return _plain(value.value, at, depth + 1)
    if is_pydantic(kind):
        return _plain(_dumped(value, at), at, depth + 1)
    if is_struct(kind):
        return _plain(_fields(value, at), at, depth + 1)
    if dataclasses.is_dataclass(kind):
        return _plain_object(((each.name, getattr(value, each.name)) for each in dataclasses.fields(value)), at, depth)
    for base in (str, int, float, datetime, date, pathlib.PurePath):  # subclasses of what has a form
        if isinstance(value, base):
            return _WRITERS[base](value, at)
    if is_of(kind, "uuid", "UUID") or is_of(kind, "decimal", "Decimal"):
        return str(value)
    raise ConversionError(at, _no_form(value))


def _dumped(value: Any, at: str) -> Any:
    adapter = sys.modules["pydantic"].TypeAdapter(type(value))
    try:
        return adapter.dump_python(value, mode="json", by_alias=True)
    except ValueError as problem:  # what pydantic derives its errors from
        raise ConversionError(at, str(problem)) from None


def _fields(value: Any, at: str) -> Any:
    try:
        return sys.modules["msgspec"].to_builtins(value, str_keys=True)
    except (TypeError, ValueError) as problem:
        raise ConversionError(at, str(problem)) from None


def _no_form(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes have no JSON form; decode them, or write them to a file in the workspace"
    if isinstance(value, collections.abc.Awaitable):
        return f"{shown(value)} was never awaited"
    if isinstance(value, Iterator):
        return f"{shown(value)} is an iterator; make it a list"
    return f"{type(value).__qualname__} has no JSON form"


def _sorted(values: Iterable[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _plain_text(value: str, _at: str) -> str:
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _plain_int(value: int, at: str) -> int:
    if value.bit_length() > _MAX_INT_BITS:
        raise ConversionError(at, "an integer of more than 4300 digits has no JSON form")
    return int(value)


def _plain_float(value: float, at: str) -> float:
    if not math.isfinite(value):
        raise ConversionError(at, f"{value!r} has no JSON form; use None")
    return float(value)


def _plain_time(value: datetime | time, _at: str) -> str:
    return re.sub(r"\+00:00$", "Z", value.isoformat())


_WRITERS: dict[Any, Callable[[Any, str], Any]] = {
    type(None): lambda value, _at: value,
    bool: lambda value, _at: value,
    int: _plain_int,
    float: _plain_float,
    str: _plain_text,
    datetime: _plain_time,
    time: _plain_time,
    date: lambda value, _at: value.isoformat(),
    timedelta: lambda value, _at: write_duration(value),
    pathlib.PurePath: lambda value, _at: os.fspath(value),
}
