"""Which files ``helmr dev`` leaves alone: those that change as soon as they are deployed, many times in a row."""

from __future__ import annotations

import pytest

from cli.restless import MANY, Restless


def _deployed(restless: Restless, *names: str, times: int, pause: float, begin: float = 0.0) -> list[str]:
    """What is left out during deployments of a second each, with pauses between them."""
    found: list[str] = []
    for number in range(times):
        at = begin + number * (1 + pause)
        found += restless.begins(names, at)
        restless.ends(at + 1)
    return found


def test_a_file_that_never_rests_is_left_out_once() -> None:
    restless = Restless()
    assert _deployed(restless, "dev.out", times=MANY - 1, pause=0.3) == []
    assert _deployed(restless, "dev.out", times=5, pause=0.3, begin=(MANY - 1) * 1.3) == ["dev.out"]
    assert restless.left_out == {"dev.out"}


@pytest.mark.parametrize(
    ("name", "pause"),
    [("prompt.md", 1.1), ("tasks.py", 0.3), ("helmr.toml", 0.3)],
    ids=["pauses", "source", "settings"],
)
def test_what_a_person_edits_is_never_left_out(name: str, pause: float) -> None:
    restless = Restless()
    assert _deployed(restless, name, times=3 * MANY, pause=pause) == []
    assert restless.left_out == set()


def test_a_row_is_broken_by_a_deployment_for_the_sake_of_others() -> None:
    restless = Restless()
    _deployed(restless, "a", times=MANY - 1, pause=0.0)
    _deployed(restless, "b", times=1, pause=0.0, begin=MANY - 1)
    assert _deployed(restless, "a", "b", times=MANY - 1, pause=0.0, begin=MANY) == ["b"]
