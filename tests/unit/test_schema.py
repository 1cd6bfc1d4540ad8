"""JSON Schemas of annotated types, and that they agree with the conversion a task does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, NotRequired, TypedDict

import jsonschema
import msgspec
import pydantic
import pytest

from helmr import ProjectError
from helmr.convert import from_builtins
from helmr.jsonform import ConversionError
from helmr.schema import json_schema


class Inner(pydantic.BaseModel):
    size: int = pydantic.Field(gt=0, alias="theSize")


class Model(pydantic.BaseModel):
    inner: Inner
    more: list[Inner] = []


@dataclass
class Review:
    pr: int
    labels: list[str]
    where: Path | None = None


class Person(TypedDict):
    name: str
    age: NotRequired[int]


class Limited(msgspec.Struct):
    n: Annotated[int, msgspec.Meta(ge=1)]


@dataclass
class Mixed:
    model: Model
    review: Review


INNER = {"theSize": 1}
REVIEW = {"pr": 1, "labels": ["a"]}


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [1, 2.0], ["1", 1.5, None, True]),
        (None, [None], [0]),
        (list[int], [[], [1]], [["a"], {}]),
        (dict[str, int], [{"a": 1}], [{"a": "b"}, []]),
        (Literal["a", "b"], ["a"], ["c"]),
        (int | None, [1, None], ["x"]),
        (Review, [REVIEW, {**REVIEW, "where": "/x"}, {**REVIEW, "unknown": 1}], [{}, {"pr": "1", "labels": []}, None]),
        (Person, [{"name": "a"}, {"name": "a", "age": 1}], [{"age": 1}, {"name": "a", "age": "x"}]),
        (Limited, [{"n": 1}], [{"n": 0}, {}]),
        (Model, [{"inner": INNER}, {"inner": INNER, "more": [INNER]}], [{"inner": {"theSize": 0}}, {"inner": {}}]),
        (list[Model], [[], [{"inner": INNER}]], [[{}]]),
        (Mixed, [{"model": {"inner": INNER}, "review": REVIEW}], [{"model": {}, "review": REVIEW}]),
    ],
)
def test_schemas_accept_what_the_task_will_accept(kind: Any, good: list[Any], bad: list[Any]) -> None:
    schema = json_schema(kind)
    assert schema is not None
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for value in good:
        assert validator.is_valid(value), value
        from_builtins(value, kind)
    for value in bad:
        assert not validator.is_valid(value), value
        with pytest.raises(ConversionError):
            from_builtins(value, kind)


@pytest.mark.parametrize("kind", [Any, object, NoReturn])
def test_no_annotation_means_anything(kind: Any) -> None:
    assert json_schema(kind) is None


@pytest.mark.parametrize("kind", [int, Review, Model])
def test_optional_accepts_null_too(kind: Any) -> None:
    schema = json_schema(kind, optional=True)
    assert schema is not None
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(None)
    assert not validator.is_valid("x")


@pytest.mark.parametrize("kind", [complex, Callable[[], int], list[complex]])
def test_other_types_are_refused(kind: Any) -> None:
    with pytest.raises(ProjectError, match="not a type that JSON can be made into"):
        json_schema(kind)
