"""From JSON builtins to the types authors annotate: payloads on their way into a task, and the check of what comes out.

Runs inside containers, so dataclasses, TypedDicts, NamedTuples and the scalar types are handled here with the standard
library; ``msgspec.Struct`` and pydantic models convert themselves. All follow the same rules: unknown fields are ignored,
and a value is never coerced from another JSON type.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from helmr.jsonform import ConversionError, below, encode, is_of, is_pydantic, is_struct, shown

#: The JSON types that are accepted, what is expected, for messages, and how it is made of that.
_Scalar = tuple[tuple[type, ...], str, Callable[[Any], Any]]


def from_builtins(value: Any, kind: Any, at: str = "") -> Any:
    """``value``, made of JSON builtins, as an instance of the annotation ``kind``.

    Args:
        at: the place of ``value`` in the whole, for messages.

    Raises:
        ConversionError: it does not fit, or ``kind`` is nothing that JSON can be made into.
    """
    if kind is Any or kind is object or isinstance(kind, TypeVar):
        return value
    origin = get_origin(kind) or kind
    inner = _unwrapped(kind, origin)
    if inner is not kind:
        return from_builtins(value, inner, at)
    scalar = _scalar(origin)
    if scalar is not None:
        return _to_scalar(value, scalar, at)
    if origin in _GENERICS:
        return _GENERICS[origin](value, get_args(kind), at)
    return _to_class(value, kind, origin, at)


def _unwrapped(kind: Any, origin: Any) -> Any:
    """What ``Annotated[T, …]``, ``Required[T]``, a NewType or a type alias stand for; anything else as it is."""
    if hasattr(kind, "__metadata__") or getattr(origin, "_name", None) in {
        "Required",
        "NotRequired",
        "ReadOnly",
        "Final",
    }:
        return kind.__origin__ if hasattr(kind, "__metadata__") else get_args(kind)[0]
    if hasattr(kind, "__supertype__"):
        return kind.__supertype__
    if type(kind).__name__ == "TypeAliasType":
        return kind.__value__
    return kind


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


def _expected(what: str, value: Any, at: str) -> ConversionError:
    return ConversionError(at, f"expected {what}, got {shown(value)}")


def _to_union(value: Any, members: tuple[Any, ...], at: str) -> Any:
    if value is None and type(None) in members:
        return None
    if type(value) in (int, float) and type(value) in members:  # 1 stays 1 in `float | int`
        return value
    problems = []
    for member in members:
        if member is not type(None):
            try:
                return from_builtins(value, member, at)
            except ConversionError as problem:
                problems.append(str(problem))
    if len(problems) == 1:
        raise ConversionError("", problems[0])
    raise ConversionError(at, f"{shown(value)} fits none of {', '.join(map(_name, members))} ({'; '.join(problems)})")


def _to_literal(value: Any, choices: tuple[Any, ...], at: str) -> Any:
    for choice in choices:
        plain = choice.value if isinstance(choice, enum.Enum) else choice
        if plain == value and type(plain) is type(value):
            return choice
    raise _expected(f"one of {', '.join(map(repr, choices))}", value, at)


def _scalar(kind: Any) -> _Scalar | None:
    """How to read a scalar type; None if ``kind`` is something else. Imports nothing (see :func:`helmr.jsonform.is_of`)."""
    if is_of(kind, "uuid", "UUID"):
        return (str,), "a UUID", kind
    if is_of(kind, "decimal", "Decimal"):
        return (str, int, float), "a decimal number", lambda value: kind(str(value))
    return _SCALARS.get(kind)


def _to_scalar(value: Any, scalar: _Scalar, at: str) -> Any:
    accepted, what, build = scalar
    if type(value) not in accepted:
        raise _expected(what, value, at)
    try:
        return build(value)
    except (ValueError, ArithmeticError):  # what other errors of this kind are derived from
        raise _expected(what, value, at) from None


def _same(value: Any) -> Any:
    return value


def _from_base64(text: str) -> bytes:
    import base64

    return base64.b64decode(text, validate=True)


def _whole(value: float) -> int:
    # 1.0 is a whole number to JSON Schema, too.
    if value != int(value):
        raise ValueError(value)
    return int(value)


def _iso(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    # Python 3.10 reads no "Z" and wants 3 or 6 digits of fraction.
    def read(text: str) -> Any:
        plain = re.sub(r"[Zz]$", "+00:00", text)
        return parse(re.sub(r"\.(\d+)", lambda match: f".{match[1][:6]:0<6}", plain))

    return read


_DURATION = re.compile(
    r"(?P<sign>[+-]?)P(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+(?:\.\d+)?)D)?"
    r"(?:T(?:(?P<hours>\d+(?:\.\d+)?)H)?(?:(?P<minutes>\d+(?:\.\d+)?)M)?(?:(?P<seconds>\d+(?:\.\d+)?)S)?)?"
)


def _read_duration(text: str) -> timedelta:
    match = _DURATION.fullmatch(text.upper())
    parts = (
        {}
        if match is None
        else {name: float(part) for name, part in match.groupdict().items() if name != "sign" and part}
    )
    if match is None or not parts:
        raise ValueError(text)
    span = timedelta(**parts)
    return -span if match["sign"] == "-" else span


_NUMBERS = (int, float)
_SCALARS: dict[Any, _Scalar] = {
    None: ((type(None),), "null", _same),
    type(None): ((type(None),), "null", _same),
    bool: ((bool,), "true or false", _same),
    int: (_NUMBERS, "a whole number", _whole),
    float: (_NUMBERS, "a number", float),
    str: ((str,), "text", _same),
    bytes: ((str,), "base64 text", _from_base64),
    datetime: ((str,), "an RFC 3339 time", _iso(datetime.fromisoformat)),
    date: ((str,), "a date", date.fromisoformat),
    time: ((str,), "a time of day", _iso(time.fromisoformat)),
    timedelta: ((str,), "an ISO 8601 duration", _read_duration),
    pathlib.Path: ((str,), "a path", pathlib.Path),
    pathlib.PurePath: ((str,), "a path", pathlib.PurePath),
    pathlib.PurePosixPath: ((str,), "a path", pathlib.PurePosixPath),
}


def _to_list(value: Any, args: tuple[Any, ...], at: str) -> list[Any]:
    if type(value) is not list:
        raise _expected("a list", value, at)
    kind = args[0] if args else Any
    return [from_builtins(item, kind, f"{at}[{index}]") for index, item in enumerate(value)]


def _to_set(value: Any, args: tuple[Any, ...], at: str) -> set[Any]:
    return set(_hashable(_to_list(value, args, at), at))


def _to_frozenset(value: Any, args: tuple[Any, ...], at: str) -> frozenset[Any]:
    return frozenset(_hashable(_to_list(value, args, at), at))


def _hashable(items: list[Any], at: str) -> list[Any]:
    for item in items:
        if isinstance(item, list | dict | set):
            raise _expected("items that a set can hold", item, at)
    return items


def _to_tuple(value: Any, args: tuple[Any, ...], at: str) -> tuple[Any, ...]:
    items = _to_list(value, (), at)
    if not args or (len(args) == 2 and args[1] is Ellipsis):
        return tuple(_to_list(value, args[:1], at))
    kinds = () if args == ((),) else args
    if len(items) != len(kinds):
        raise _expected(f"a list of {len(kinds)}", value, at)
    return tuple(
        from_builtins(item, kind, f"{at}[{index}]") for index, (item, kind) in enumerate(zip(items, kinds, strict=True))
    )


def _to_dict(value: Any, args: tuple[Any, ...], at: str) -> dict[Any, Any]:
    if type(value) is not dict:
        raise _expected("an object", value, at)
    key_kind, value_kind = args or (Any, Any)
    return {_to_key(key, key_kind, at): from_builtins(item, value_kind, below(at, key)) for key, item in value.items()}


def _to_key(key: str, kind: Any, at: str) -> Any:
    # JSON keys are text; whole numbers are the one other kind that to_builtins writes as keys without a form of their own.
    if kind is int and re.fullmatch(r"-?\d+", key):
        return int(key)
    return from_builtins(key, kind, below(at, key))


_GENERICS: dict[Any, Callable[[Any, tuple[Any, ...], str], Any]] = {
    **dict.fromkeys((Union, types.UnionType), _to_union),
    Literal: _to_literal,
    **dict.fromkeys((list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection), _to_list),
    collections.abc.MutableSequence: _to_list,
    **dict.fromkeys((set, collections.abc.Set, collections.abc.MutableSet), _to_set),
    frozenset: _to_frozenset,
    tuple: _to_tuple,
    **dict.fromkeys((dict, collections.abc.Mapping, collections.abc.MutableMapping), _to_dict),
}


def _to_class(value: Any, kind: Any, origin: Any, at: str) -> Any:
    if is_pydantic(origin):
        return _delegated(lambda: sys.modules["pydantic"].TypeAdapter(kind).validate_json(encode(value)), at)
    if is_struct(origin):
        return _delegated(lambda: sys.modules["msgspec"].convert(value, kind, str_keys=True), at)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _to_enum(value, origin, at)
    if typing.is_typeddict(origin):
        return _to_typed_dict(value, origin, at)
    if dataclasses.is_dataclass(origin):
        return _to_dataclass(value, origin, at)
    if isinstance(origin, type) and issubclass(origin, tuple) and hasattr(origin, "_fields"):
        hints = _hints(origin)
        return origin(*_to_tuple(value, tuple(hints.get(name, Any) for name in origin._fields), at))
    raise ConversionError(at, f"{_name(kind)} is not a type that JSON can be made into")


def _delegated(convert: Callable[[], Any], at: str) -> Any:
    try:
        return convert()
    except ValueError as problem:  # what both libraries derive their validation errors from
        raise ConversionError(at, str(problem)) from None


def _to_enum(value: Any, kind: type[enum.Enum], at: str) -> enum.Enum:
    for member in kind:
        if (member.value == value and type(value) is not bool) or member.value is value:
            return member
    raise _expected(f"one of {', '.join(repr(member.value) for member in kind)}", value, at)


@functools.lru_cache(maxsize=512)
def _hints(kind: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except NameError as failure:
        raise ConversionError("", f"an annotation of {_name(kind)} cannot be resolved: {failure}") from None


def _to_typed_dict(value: Any, kind: Any, at: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise _expected("an object", value, at)
    hints = _hints(kind)
    _require((name for name in hints if _is_required(name, hints[name], kind)), value, at)
    return {name: from_builtins(value[name], hints[name], below(at, name)) for name in hints if name in value}


def _is_required(name: str, hint: Any, kind: Any) -> bool:
    # When annotations are text, __required_keys__ does not know what they say.
    marker = getattr(get_origin(hint), "_name", None)
    return marker == "Required" or (marker != "NotRequired" and name in kind.__required_keys__)


def _to_dataclass(value: Any, kind: Any, at: str) -> Any:
    if type(value) is not dict:
        raise _expected("an object", value, at)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    unset = dataclasses.MISSING
    _require((each.name for each in fields if each.default is unset and each.default_factory is unset), value, at)
    hints = _hints(kind)
    arguments = {
        each.name: from_builtins(value[each.name], hints[each.name], below(at, each.name))
        for each in fields
        if each.name in value
    }
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as problem:  # a __post_init__ that checks
        raise ConversionError(at, str(problem)) from problem


def _require(names: Iterable[str], value: dict[str, Any], at: str) -> None:
    missing = sorted(name for name in names if name not in value)
    if missing:
        raise ConversionError(at, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
