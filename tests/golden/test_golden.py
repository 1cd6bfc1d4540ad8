"""Today's reducers fold what releases have written to what was written then: no history is left behind by a change."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus.log import RUN, SESSION, TOKEN, WORKSPACE, Kind
from helmr.events import RUN_KINDS, Draft
from helmr.version import __version__

FOLDER = Path(__file__).parent
HISTORIES = sorted(FOLDER.glob("*/*.jsonl"))
_KINDS: dict[str, Kind[Any, Any]] = {kind.name: kind for kind in (RUN, SESSION, WORKSPACE, TOKEN)}
#: What no recorded life comes by.
_RARE = {"log", "wait_cancelled", "wait_timed_out"}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_history_folds_to_the_states_it_was_written_with(path: Path) -> None:
    states: dict[tuple[str, str], Any] = {}
    for line in _lines(path):
        kind = _KINDS[line["entity"]]
        event = kind.decode(msgspec.json.encode(line["event"]))
        key = (kind.name, event.state.id)
        draft = Draft(kind=event.kind, data=event.data, message=event.message, source=event.source)
        states[key] = kind.fold(states.get(key), draft, event.at, event.state.id)
        assert states[key] == event.state, f"{key} after its event {event.cursor}, {event.kind}"
    assert states


def test_this_release_has_recorded_every_kind_of_event() -> None:
    kinds = Counter(
        line["event"]["kind"]
        for path in HISTORIES
        if path.parent.name == __version__
        for line in _lines(path)
        if line["entity"] == "run"
    )
    assert set(RUN_KINDS) - _RARE <= set(kinds)
