"""From JSON to annotated types and back, for every kind of type an author may choose."""

from __future__ import annotations

import collections.abc
import enum
import json
import math
import sys
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    Optional,
    TypedDict,
    TypeVar,
    Union,
)

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helmr.convert import from_builtins
from helmr.jsonform import ConversionError, dumps, encode, shown, to_builtins, write_duration

T = TypeVar("T")
UserId = NewType("UserId", int)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Item:
    name: str
    count: int = 1


@dataclass
class Order:
    id: uuid.UUID
    items: list[Item]
    colour: Colour = Colour.RED
    note: str | None = None
    tags: set[str] = field(default_factory=set)
    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if len(self.items) > 3:
            raise ValueError("at most three items")


@dataclass
class Box(Generic[T]):
    content: T


class Person(TypedDict):
    name: str
    age: NotRequired[int]


class Point(NamedTuple):
    x: int
    y: int = 0


class Wire(msgspec.Struct, rename="camel"):
    user_name: str
    sent_at: datetime


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    size: int = pydantic.Field(gt=0)
    at: datetime
    nick: str = pydantic.Field(default="x", alias="nickName")


@pydantic.dataclasses.dataclass
class Checked:
    size: Annotated[int, pydantic.Field(gt=0)]


ID = "12345678-1234-5678-1234-567812345678"
NOON = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)  # noqa: UP017

ROUND_TRIPS: list[tuple[Any, Any, Any]] = [
    (int, 3, 3),
    (float, 2.5, 2.5),
    (bool, True, True),
    (str, "ä", "ä"),
    (None, None, None),
    (Any, {"a": [1]}, {"a": [1]}),
    (object, [1], [1]),
    (list[int], [1, 2], [1, 2]),
    (list, [1, "a"], [1, "a"]),
    (dict, {"a": 1}, {"a": 1}),
    (dict[str, Item], {"a": {"name": "n", "count": 1}}, {"a": Item("n")}),
    (dict[int, str], {"1": "a"}, {1: "a"}),
    (dict[Colour, int], {"red": 1}, {Colour.RED: 1}),
    (collections.abc.Mapping[str, int], {"a": 1}, {"a": 1}),
    (collections.abc.Sequence[int], [1], [1]),
    (set[int], [1, 2], {1, 2}),
    (frozenset[str], ["a"], frozenset({"a"})),
    (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple, [1], (1,)),
    (tuple[()], [], ()),
    (Literal["a", 1], "a", "a"),
    (Literal[Colour.RED], "red", Colour.RED),
    (Optional[int], None, None),  # noqa: UP045
    (Union[int, str], "a", "a"),  # noqa: UP007
    (Item | None, {"name": "n", "count": 2}, Item("n", 2)),
    (float | int, 1, 1),
    (datetime | str, "2026-05-01T12:00:00Z", NOON),
    (Annotated[int, "metres"], 1, 1),
    (UserId, 5, 5),
    (Colour, "blue", Colour.BLUE),
    (Level, 2, Level.HIGH),
    (datetime, "2026-05-01T12:00:00Z", NOON),
    (date, "2026-05-01", date(2026, 5, 1)),
    (time, "12:30:00", time(12, 30)),
    (timedelta, "P1DT1800S", timedelta(days=1, minutes=30)),
    (uuid.UUID, ID, uuid.UUID(ID)),
    (Decimal, "1.10", Decimal("1.10")),
    (Path, "/a/b", Path("/a/b")),
    (Person, {"name": "Ada"}, {"name": "Ada"}),
    (Person, {"name": "Ada", "age": 36}, {"name": "Ada", "age": 36}),
    (Point, [1, 2], Point(1, 2)),
    (Box[int], {"content": [1]}, Box([1])),
    (Wire, {"userName": "ada", "sentAt": "2026-05-01T12:00:00Z"}, Wire(user_name="ada", sent_at=NOON)),
    (Model, {"size": 1, "at": "2026-05-01T12:00:00Z", "nickName": "y"}, Model(size=1, at=NOON, nickName="y")),
    (list[Model], [{"size": 1, "at": "2026-05-01T12:00:00Z", "nickName": "x"}], [Model(size=1, at=NOON)]),
    (Checked, {"size": 2}, Checked(2)),
]


@pytest.mark.parametrize(("kind", "plain", "typed"), ROUND_TRIPS, ids=[str(each[0])[-30:] for each in ROUND_TRIPS])
def test_values_go_in_and_come_out_again(kind: Any, plain: Any, typed: Any) -> None:
    read = from_builtins(plain, kind)
    assert read == typed
    assert type(read) is type(typed)
    assert to_builtins(typed) == plain
    json.dumps(to_builtins(typed), allow_nan=False)


def test_a_nested_dataclass_with_defaults() -> None:
    order = from_builtins({"id": ID, "items": [{"name": "a"}, {"name": "b", "count": 2}], "extra": 1}, Order)
    assert order == Order(id=uuid.UUID(ID), items=[Item("a"), Item("b", 2)])
    assert to_builtins(order) == {
        "id": ID,
        "items": [{"name": "a", "count": 1}, {"name": "b", "count": 2}],
        "colour": "red",
        "note": None,
        "tags": [],
        "total": 0,
    }


@pytest.mark.parametrize(
    ("kind", "plain", "why"),
    [
        (int, "1", "expected a whole number, got '1'"),
        (int, 1.5, "expected a whole number, got 1.5"),
        (int, True, "expected a whole number, got True"),
        (float, "x", "expected a number"),
        (str, 1, "expected text, got 1"),
        (bool, 0, "expected true or false"),
        (None, 0, "expected null"),
        (bytes, "%%", "expected base64 text"),
        (datetime, "yesterday", "expected an RFC 3339 time"),
        (date, "2026-13-01", "expected a date"),
        (timedelta, "P", "expected an ISO 8601 duration"),
        (timedelta, "P99999999999D", "expected an ISO 8601 duration"),
        (uuid.UUID, "123", "expected a UUID"),
        (Decimal, "one", "expected a decimal number"),
        (Colour, "green", "expected one of 'red', 'blue', got 'green'"),
        (Level, True, "expected one of 1, 2"),
        (Literal[1], True, "expected one of 1, got True"),
        (list[int], {"a": 1}, "expected a list"),
        (list[int], [1, "a"], r"^\[1\]: expected a whole number"),
        (dict[str, int], {"a": "b"}, r"^a: expected a whole number"),
        (dict[int, int], {"a": 1}, "expected a whole number"),
        (dict[str, int], [], "expected an object"),
        (tuple[int, str], [1], "expected a list of 2"),
        (set[Any], [[1]], "a set can hold"),
        (int | str, 1.5, "fits none of int, str"),
        (int | None, "a", "^expected a whole number, got 'a'$"),
        (Item, [], "expected an object"),
        (Item, {}, "^name is missing$"),
        (Person, {"age": 1}, "^name is missing$"),
        (Person, {"name": "a", "age": "b"}, "^age: expected a whole number"),
        (Person, 3, "expected an object"),
        (Order, {}, "^id, items are missing$"),
        (Order, {"id": ID, "items": [{"name": "a"}, {"name": 2}]}, r"^items\[1\]\.name: expected text, got 2$"),
        (Order, {"id": ID, "items": [{"name": "a"}] * 4}, "^at most three items$"),
        (Point, [1, "b"], r"^\[1\]: expected a whole number"),
        (Wire, {"userName": 1}, "userName"),
        (Model, {"size": 0, "at": "2026-05-01T12:00:00Z"}, "greater than 0"),
        (list[Model], [{"size": "1", "at": "2026-05-01T12:00:00Z"}], r"^\[0\]: "),
        (Checked, {"size": -1}, "greater than 0"),
        (Callable[[], int], 1, "not a type that JSON can be made into"),
        (complex, 1, "not a type that JSON can be made into"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(kind: Any, plain: Any, why: str) -> None:
    with pytest.raises(ConversionError, match=why):
        from_builtins(plain, kind)


@pytest.mark.parametrize(
    ("text", "microsecond"),
    [
        ("2026-05-01T12:00:00.5Z", 500_000),
        ("2026-05-01T12:00:00.123456789+02:00", 123_456),
        ("2026-05-01T12:00:00z", 0),
    ],
)
def test_times_as_other_systems_write_them(text: str, microsecond: int) -> None:
    read = from_builtins(text, datetime)
    assert read.microsecond == microsecond
    assert read.tzinfo is not None


def test_whole_floats_are_whole_numbers_as_in_json_schema() -> None:
    assert from_builtins(2.0, int) == 2
    assert type(from_builtins(2.0, int)) is int


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type aliases came with 3.12")
def test_a_type_alias() -> None:
    scope: dict[str, Any] = {}
    exec("type Sizes = list[int]", scope)  # noqa: S102
    assert from_builtins([1], scope["Sizes"]) == [1]


class Loose:
    pass


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"x", "bytes have no JSON form"),
        ({"a": [1, b"x"]}, r"^a\[1\]: bytes"),
        (math.nan, "nan has no JSON form"),
        (-math.inf, "-inf has no JSON form"),
        (Wire, "StructMeta has no JSON form"),
        (Loose(), "Loose has no JSON form"),
        (iter([1]), "iterator"),
        ({(1, 2): 3}, "cannot be a JSON key"),
        ({True: 1}, "cannot be a JSON key"),
        ({1: "a", "1": "b"}, "two keys become '1'"),
        ({"a": Decimal("NaN"), "b": 1j}, "complex has no JSON form"),
    ],
)
def test_what_is_not_json_is_refused(value: Any, why: str) -> None:
    with pytest.raises(ConversionError, match=why):
        to_builtins(value)


def test_an_integer_that_python_does_not_print_is_refused() -> None:
    with pytest.raises(ConversionError, match="4300 digits"):
        to_builtins(10**5000)
    assert "repr raised ValueError" in shown(10**5000)


def test_a_coroutine_was_never_awaited() -> None:
    async def later() -> None: ...

    coroutine = later()
    with pytest.raises(ConversionError, match="never awaited"):
        to_builtins({"x": coroutine})
    coroutine.close()


def test_a_structure_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConversionError, match="contains itself"):
        to_builtins(loop)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, 2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (deque([1]), [1]),
        (OrderedDict(a=1), {"a": 1}),
        ({Colour.RED: 1, Level.LOW: 2, date(2026, 1, 1): 3}, {"red": 1, "1": 2, "2026-01-01": 3}),
        (datetime(2026, 5, 1, 14, tzinfo=timezone(timedelta(hours=2))), "2026-05-01T14:00:00+02:00"),
        (datetime(2026, 5, 1, 14), "2026-05-01T14:00:00"),  # noqa: DTZ001
        (Level.HIGH, 2),
        (Wire(user_name="a", sent_at=NOON), {"userName": "a", "sentAt": "2026-05-01T12:00:00Z"}),
    ],
)
def test_what_becomes_json(value: Any, plain: Any) -> None:
    assert to_builtins(value) == plain


def test_lone_surrogates_are_replaced() -> None:
    assert to_builtins(["a\ud800b", {"\udfff": 1}]) == ["a�b", {"�": 1}]
    assert to_builtins("\ud83d\ude00") == "😀"
    assert encode("\ud800") == b'"?"'


def test_dumps_is_compact_and_strict() -> None:
    assert dumps({"a": [1, "ä"]}) == '{"a":[1,"ä"]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(math.nan)


@given(st.timedeltas())
def test_durations_round_trip_and_agree_with_msgspec(span: timedelta) -> None:
    text = write_duration(span)
    assert abs(from_builtins(text, timedelta) - span) <= timedelta(microseconds=1)
    assert msgspec.json.decode(encode(text), type=timedelta) == span


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@given(json_values)
def test_json_is_its_own_form(value: Any) -> None:
    assert json.loads(encode(to_builtins(value))) == value
