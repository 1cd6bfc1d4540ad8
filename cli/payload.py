"""JSON from whichever way it was given on the command line: the payload of a start, the data of a record or a token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from helmr.errors import UsageError


def payload_of(pairs: Sequence[str], text: str | None, file: str | None, *, name: str = "payload") -> Any:
    """The payload (or whatever ``name`` is) as JSON values; None when none was given.

    Raises:
        UsageError: it was given in several ways, or is not what it should be.
    """
    ways = ((f"--{name}", pairs), (f"--{name}-json", text), (f"--{name}-file", file))
    given = [way for way, value in ways if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint=f"give the {name} in one way")
    if text is not None:
        return json_of(text.encode(), f"--{name}-json")
    if file is not None:
        return json_of(_read(file, f"--{name}-file"), f"--{name}-file {file}")
    return _from_pairs(pairs, f"--{name}") if pairs else None


def json_of(data: bytes, origin: str) -> Any:
    """JSON that the user wrote.

    Raises:
        UsageError: it is not JSON; says where.
    """
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{origin} is not JSON: {error}", hint='quote it for the shell: \'{"name": "Ada"}\''
        ) from error


def metadata_of(text: str | None, *, example: str) -> dict[str, Any] | None:
    """The object given with ``--metadata-json``; None when none was; ``example`` shows one that makes sense here.

    Raises:
        UsageError: it is not JSON, or no object.
    """
    if text is None:
        return None
    metadata = json_of(text.encode(), "--metadata-json")
    if not isinstance(metadata, dict):
        raise UsageError("--metadata-json is not an object", hint=f"e.g. '{example}'")
    return metadata


def _read(file: str, option: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror}") from error


def _from_pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``; a value is JSON where it can be, and text otherwise."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            hint = f'e.g. {option} name=Ada {option} user.age=36, or as JSON: {option}-json \'{{"name": "Ada"}}\''
            raise UsageError(f"{option} {pair!r} is not KEY=VALUE", hint=hint)
        place = result
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"{option} {pair!r}: {part} has a value already")
        if path[-1] in place:
            raise UsageError(f"{option} {pair!r}: {key} is given twice")
        place[path[-1]] = value_of(value)
    return result


def value_of(text: str) -> Any:
    """A value written on the command line: JSON where it can be, and text otherwise."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
