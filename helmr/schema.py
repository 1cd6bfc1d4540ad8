"""JSON Schemas (draft 2020-12) of the types authors annotate, so that a payload can be checked before a run exists."""

from __future__ import annotations

import pathlib
from typing import Any, Literal, NoReturn, get_origin

import msgspec

from helmr.errors import ProjectError
from helmr.jsonform import is_pydantic

JsonSchema = dict[str, Any]
Mode = Literal["validation", "serialization"]

#: Annotations that say nothing about the JSON.
_ANYTHING: tuple[Any, ...] = (Any, object, NoReturn)


def json_schema(kind: Any, *, mode: Mode = "validation", optional: bool = False) -> JsonSchema | None:
    """The schema of what JSON ``kind`` accepts, or None if that is anything.

    Args:
        mode: what pydantic models are asked for: what they accept (``validation``) or what they produce (``serialization``).
        optional: whether null is fine, too.

    Raises:
        ProjectError: ``kind`` is, or contains, a type that has no JSON form.
    """
    if kind in _ANYTHING:
        return None
    definitions: JsonSchema = {}

    def custom(part: type) -> JsonSchema:
        if is_pydantic(part):
            return _pydantic_schema(part, mode, definitions)
        if issubclass(part, pathlib.PurePath):
            return {"type": "string"}
        raise NotImplementedError

    try:
        schema = msgspec.json.schema(kind, schema_hook=custom)
    except (TypeError, NotImplementedError, NameError) as failure:
        raise ProjectError(
            f"{_named(kind)} is not a type that JSON can be made into: {_first_line(failure)}",
            hint="use builtins, a dataclass, a TypedDict, a msgspec.Struct or a pydantic model",
        ) from failure
    definitions.update(schema.pop("$defs", {}))
    if optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "$defs": definitions} if definitions else schema


def _pydantic_schema(kind: type, mode: Mode, definitions: JsonSchema) -> JsonSchema:
    """Schema of a pydantic model; what it refers to goes to the common ``definitions``, where its references point."""
    from pydantic import TypeAdapter

    schema: JsonSchema = TypeAdapter(kind).json_schema(mode=mode)
    definitions.update(schema.pop("$defs", {}))
    return schema


def _named(kind: Any) -> str:
    return kind.__qualname__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def _first_line(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
