"""The error tree: stable codes, documented exit codes, and the same error on both ends of the wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helmr import errors
from helmr.errors import HelmrError, NotFound, cause, from_dict


def _kinds(root: type[HelmrError] = HelmrError) -> Iterator[type[HelmrError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == "helmr.errors":
            yield from _kinds(child)


@pytest.mark.parametrize("kind", list(_kinds()), ids=lambda kind: kind.code)
def test_an_error_is_the_same_on_both_ends_of_the_wire(kind: type[HelmrError]) -> None:
    sent = kind("what and why", hint="what to do", details={"path": "$.name"})
    received = from_dict(sent.to_dict())
    assert type(received) is kind
    assert received.to_dict() == sent.to_dict()
    assert str(received) == "what and why"


def test_codes_are_unique_and_listed_in_the_docstring() -> None:
    codes = [kind.code for kind in _kinds()]
    assert len(codes) == len(set(codes))
    assert all(
        f"{kind.code}" in (errors.__doc__ or "") and kind.__name__ in (errors.__doc__ or "") for kind in _kinds()
    )


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.HelmrError, 1),
        (errors.UsageError, 2),
        (errors.PayloadInvalid, 2),
        (errors.RunFailed, 3),
        (errors.Unavailable, 4),
        (errors.EngineUnavailable, 4),
        (errors.NotAllowed, 4),
        (errors.NotFound, 5),
        (errors.Conflict, 6),
        (errors.TimedOut, 7),
    ],
)
def test_exit_codes_are_the_documented_ones(kind: type[HelmrError], exit_code: int) -> None:
    assert kind.exit_code == exit_code


def test_a_private_refinement_does_not_take_its_parents_place() -> None:
    refined = type("Refined", (errors.Conflict,), {})
    assert type(from_dict(refined("m").to_dict())) is errors.Conflict


@pytest.mark.parametrize("data", [{}, {"code": "from_the_future", "message": "m"}, {"code": None, "details": None}])
def test_an_error_nobody_knows_is_still_an_error(data: dict[str, object]) -> None:
    assert type(from_dict(data)) is HelmrError


def test_of_a_group_helmrs_own_error_is_told_and_else_the_first() -> None:
    own, other, third = NotFound("x"), ValueError("y"), OSError("z")
    assert cause(ExceptionGroup("a", [other, ExceptionGroup("b", [third, own])])) is own
    assert cause(ExceptionGroup("a", [ExceptionGroup("b", [third]), other])) is third
    assert cause(other) is other
