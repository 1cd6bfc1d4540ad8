"""Searching the logs of many runs: which lines are found, with what around them, and in pieces of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats

from bus.setup import ensure_topology
from helmr.errors import UsageError
from store import search
from tests.integration.history import ask, history, publish, publish_log
from tests.lives import Life

pytestmark = pytest.mark.anyio


@pytest.fixture
async def lives(nc: Nats) -> list[Life]:
    """Two runs of two tasks that have ended, with logs in several chunks."""
    await ensure_topology(nc)
    first, second = (Life(task_id=task).queued().leased().succeeds() for task in ("review", "deploy"))
    for life in (first, second):
        await publish(nc, life.published())
    await publish_log(nc, first.id, b"one\ntwo\nthe needle is here\nfour\n")
    await publish_log(nc, first.id, b"five\n", offset=33)
    await publish_log(nc, second.id, b"no such thing\n")
    await publish_log(nc, second.id, b"a Needle\nand needle 42\n", stream="stderr")
    return [first, second]


async def found(nc: Nats, **wanted: Any) -> list[dict[str, Any]]:
    """All matches, from as many replies as it takes."""
    matches: list[dict[str, Any]] = []
    after = None
    while True:
        page = await ask(nc, "search", {**wanted, "after": after, "fresh": after is None})
        matches += page["matches"]
        after = page["next"]
        if after is None:
            return matches


async def test_lines_are_found_in_order(nc: Nats, lives: list[Life], tmp_path: Path) -> None:
    first, second = lives
    async with history(nc, tmp_path / "h"):
        matches = await found(nc, pattern="needle")
        assert [(m["run_id"], m["stream"], m["line"], m["text"]) for m in matches] == [
            (first.id, "stdout", 3, "the needle is here"),
            (second.id, "stderr", 2, "and needle 42"),
        ]
        assert [m["text"] for m in await found(nc, pattern="NEEDLE", ignore_case=True)] == [
            "the needle is here",
            "a Needle",
            "and needle 42",
        ]
        assert [m["text"] for m in await found(nc, pattern="^a.*[0-9]+$", regex=True)] == ["and needle 42"]
        assert [m["text"] for m in await found(nc, pattern="needle", task="review")] == ["the needle is here"]
        assert [m["text"] for m in await found(nc, pattern="needle", run_id=second.id)] == ["and needle 42"]
        assert [m["text"] for m in await found(nc, pattern="needle", stream="stdout")] == ["the needle is here"]
        assert await found(nc, pattern="[", stream="stdout") == []


@pytest.mark.usefixtures("lives")
async def test_context_reaches_over_chunks(nc: Nats, tmp_path: Path) -> None:
    async with history(nc, tmp_path / "h"):
        (match,) = await found(nc, pattern="the needle", context=3)
        assert (match["before"], match["after"]) == (["one", "two"], ["four", "five"])
        (match,) = await found(nc, pattern="five", context=2)
        assert (match["before"], match["after"]) == (["the needle is here", "four"], [])


@pytest.mark.usefixtures("lives")
async def test_a_search_comes_in_pieces(nc: Nats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_WINDOW", 1)
    monkeypatch.setattr(search, "_MATCHES", 1)
    async with history(nc, tmp_path / "h"):
        page = await ask(nc, "search", {"pattern": "needle", "fresh": True})
        assert len(page["matches"]) == 1
        assert page["next"] is not None
        assert len(await found(nc, pattern="needle")) == 2


@pytest.mark.usefixtures("lives")
async def test_what_cannot_be_searched_for_is_refused(nc: Nats, tmp_path: Path) -> None:
    async with history(nc, tmp_path / "h"):
        for wanted in (
            {"pattern": ""},
            {"pattern": "a\nb"},
            {"pattern": "(", "regex": True},
            {"pattern": "a", "context": 51},
            {"pattern": "a", "after": "x"},
            {"pattern": "a", "since": "yesterday"},
        ):
            with pytest.raises(UsageError):
                await ask(nc, "search", wanted)
