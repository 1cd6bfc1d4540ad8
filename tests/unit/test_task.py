"""``@task``: what it accepts, what it records, what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from helmr import ProjectError, Queue, Retry, Sandbox, Secret, Task, registry, task


@dataclass
class Review:
    pr: int


def test_a_task_is_the_function_still() -> None:
    @task("review-pr")
    def review(payload: Review, ctx: object = None) -> int:  # noqa: ARG001
        """Look at it."""
        return payload.pr

    assert isinstance(review, Task)
    assert review(Review(pr=7)) == 7
    assert review(payload=Review(pr=8)) == 8
    assert review.__name__ == "review"
    assert review.__doc__ == "Look at it."
    assert list(inspect.signature(review).parameters) == ["payload", "ctx"]


def test_defaults() -> None:
    @task("plain")
    def plain() -> None: ...

    assert (plain.max_duration, plain.park_after, plain.cancel_grace, plain.ttl) == (900, 60, 10, None)
    assert (plain.sandbox, plain.retry, plain.queue, plain.secrets) == (None, None, None, ())
    assert plain.on_worker_lost == "redispatch"


def test_everything_can_be_said() -> None:
    box, queue, retry = Sandbox("box"), Queue("q", concurrency=2), Retry(max_attempts=4)
    secret = Secret("TOKEN")

    @task(
        "full",
        sandbox=box,
        max_duration="15m",
        secrets=[secret],
        retry=retry,
        queue=queue,
        park_after="2m",
        ttl=timedelta(hours=1),
        cancel_grace=5,
        on_worker_lost="fail",
    )
    def full() -> None: ...

    assert (full.max_duration, full.park_after, full.ttl, full.cancel_grace) == (900, 120, 3600, 5)
    assert (full.sandbox, full.queue, full.retry, full.secrets) == (box, queue, retry, (secret,))
    assert full.on_worker_lost == "fail"


def test_a_bare_decorator_takes_the_functions_name() -> None:
    @task
    def nightly_report() -> None: ...

    @task()
    def other_report() -> None: ...

    assert (nightly_report.id, other_report.id) == ("nightly-report", "other-report")
    assert registry.tasks["nightly-report"] is nightly_report


def test_the_location_is_the_authors() -> None:
    @task
    def here() -> None: ...

    assert here.location.file == __file__
    assert here.location.line == inspect.getsourcelines(here.fn)[1]


def test_types_are_resolved_from_where_the_task_is_defined() -> None:
    @dataclass
    class Local:
        x: int

    @task
    def typed(payload: Local) -> list[Local]:
        return [payload]

    @task
    def untyped(payload, ctx):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
        return payload

    @task
    def without() -> None: ...

    assert typed.payload_type is Local
    assert typed.return_type == list[Local]
    assert untyped.payload_type is Any
    assert without.payload_type is None


def test_an_annotation_that_cannot_be_found_is_refused_with_its_place() -> None:
    @task
    def lost(payload: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ProjectError, match=r"test_task\.py:\d+: task 'lost': .*Nowhere") as refused:
        _ = lost.payload_type
    assert "TYPE_CHECKING" in (refused.value.hint or "")


def test_the_annotation_of_ctx_need_not_be_importable() -> None:
    @task
    def fine(payload: int, ctx: OnlyForTheChecker) -> int:  # type: ignore[name-defined]  # noqa: ARG001, F821
        return payload

    assert fine.payload_type is int


def payload_only(payload: int) -> None: ...
def ctx_only(ctx: object) -> None: ...
def swapped(ctx: object, payload: int) -> None: ...
def positional(payload: int, /) -> None: ...
def keyword(*, payload: int, ctx: object) -> None: ...
async def asynchronous(payload: int, ctx: object) -> None: ...


@pytest.mark.parametrize(
    ("fn", "args", "kwargs"),
    [
        (payload_only, (1,), {}),
        (ctx_only, ("ctx",), {}),
        (swapped, ("ctx", 1), {}),
        (positional, (1,), {}),
        (keyword, (), {"payload": 1, "ctx": "ctx"}),
        (asynchronous, (1, "ctx"), {}),
    ],
)
def test_payload_and_ctx_are_passed_by_name(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    bound = task("t")(fn).arguments(1, "ctx")
    assert (bound.args, bound.kwargs) == (args, kwargs)


def wrong_name(data: int) -> None: ...
def default_elsewhere(payload: int, verbose: bool = False) -> None: ...
def star(*payload: int) -> None: ...
def star_star(**ctx: int) -> None: ...
def generator(payload: int) -> Iterator[int]:
    yield payload


@pytest.mark.parametrize("fn", [wrong_name, default_elsewhere, star, star_star, generator])
def test_other_functions_are_refused_naming_file_and_line(fn: Callable[..., Any]) -> None:
    with pytest.raises(ProjectError, match=rf"test_task\.py:{inspect.getsourcelines(fn)[1]}: task 't'"):
        task("t")(fn)
    assert "t" not in registry.tasks


@pytest.mark.parametrize("name", ["", "-x", "_x", "a b", "a.b", "a/b", "x" * 129, "ä"])
def test_ids_are_checked(name: str) -> None:
    with pytest.raises(ProjectError, match="is not a task name"):
        task(name)(payload_only)


@pytest.mark.parametrize("name", ["a", "A-b_c9", "9", "x" * 128])
def test_good_ids_are_taken(name: str) -> None:
    assert task(name)(payload_only).id == name


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_duration": 4.9}, "not between 5s and 24h"),
        ({"max_duration": "25h"}, "not between 5s and 24h"),
        ({"max_duration": "soon"}, "max_duration 'soon' is not a duration"),
        ({"ttl": "-1"}, "negative"),
        ({"cancel_grace": "x"}, "cancel_grace"),
        ({"park_after": "x"}, "park_after"),
        ({"on_worker_lost": "panic"}, "on_worker_lost"),
        ({"sandbox": "box"}, "is not a Sandbox"),
        ({"queue": "reviews"}, "is not a Queue"),
        ({"retry": 3}, "is not a Retry"),
        ({"secrets": ["TOKEN"]}, "secrets has 'TOKEN' in it"),
        ({"secrets": [Secret("A", env="X"), Secret("B", env="X")]}, "two secrets go to X"),
    ],
)
def test_options_are_checked(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ProjectError, match=why) as refused:
        task("t", **options)(payload_only)
    assert "test_task.py:" in refused.value.message


@pytest.mark.parametrize("edge", [5, 86_400, "24h"])
def test_max_duration_includes_its_limits(edge: Any) -> None:
    assert task("t", max_duration=edge)(payload_only).max_duration in (5, 86_400)


def test_two_tasks_of_one_id_are_refused_naming_both_places() -> None:
    first = task("same")(payload_only)
    with pytest.raises(ProjectError, match="task 'same' is defined twice") as refused:
        task("same")(ctx_only)
    lines = [inspect.getsourcelines(fn)[1] for fn in (payload_only, ctx_only)]
    assert refused.value.details["locations"] == [f"{__file__}:{line}" for line in lines]
    assert registry.tasks["same"] is first


def test_a_reloaded_module_may_define_its_task_again() -> None:
    task("same")(payload_only)
    again = task("same")(payload_only)
    assert registry.tasks["same"] is again


def test_a_default_of_payload_makes_it_optional() -> None:
    @task
    def optional(payload: int = 3) -> None: ...

    assert optional.payload_optional
    assert optional.payload_default == 3
    assert not task("t")(payload_only).payload_optional
    assert not task("c")(ctx_only).payload_optional
