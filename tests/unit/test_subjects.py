"""Subjects: what is built is parsed back, filters cover what they should, and nothing foreign gets into a subject."""

from __future__ import annotations

import re

import pytest

from helmr import ids, subjects
from helmr.errors import UsageError
from helmr.events import RUN_KINDS
from helmr.subjects import Scope

_SCOPE = Scope("acme", "prod")
_RUN = ids.new("run")


def _covers(pattern: str, subject: str) -> bool:
    """What a NATS server means by a filter."""
    words = [".+" if word == ">" else "[^.]+" if word == "*" else re.escape(word) for word in pattern.split(".")]
    return re.fullmatch(r"\.".join(words), subject) is not None


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_every_event_lies_under_the_history_of_its_run(kind: str) -> None:
    subject = subjects.event(_SCOPE, "run", _RUN, kind)
    assert _covers(subjects.history(_SCOPE, "run", _RUN), subject)
    assert _covers(subjects.ALL_EVENTS, subject)
    assert not _covers(subjects.history(_SCOPE, "run", ids.new("run")), subject)
    assert not _covers(subjects.history(Scope("acme", "dev"), "run", _RUN), subject)


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_an_event_subject_is_parsed_back(kind: str) -> None:
    parsed = subjects.parse_event(subjects.event(_SCOPE, "run", _RUN, kind))
    token = "journal" if kind in subjects.JOURNAL_KINDS else kind
    assert parsed == (_SCOPE, "run", _RUN, token, None, None)


@pytest.mark.parametrize("lane", ["default", "@wrk_1", "~host_1"])
def test_a_queued_event_is_dispatched_in_its_lane_alone(lane: str) -> None:
    subject = subjects.event(_SCOPE, "run", _RUN, "queued", lane=lane, priority=3)
    assert subjects.parse_event(subject)[3:] == ("queued", lane, "3")
    assert _covers(subjects.lane(lane), subject)
    assert not _covers(subjects.lane("other"), subject)


def test_a_negative_priority_stays_one_token() -> None:
    subject = subjects.event(_SCOPE, "run", _RUN, "queued", lane="default", priority=-5)
    assert subjects.parse_event(subject).priority == "-5"


def test_what_is_stored_is_heard_under_the_live_subject() -> None:
    stored = subjects.event(_SCOPE, "run", _RUN, "failed")
    heard = subjects.ALL_LIVE.removesuffix(">") + stored.removeprefix(subjects.ALL_EVENTS.removesuffix(">"))
    assert _covers(subjects.live(_SCOPE, "run", _RUN), heard)
    assert _covers(subjects.live(_SCOPE, "run", kind="failed"), heard)
    assert not _covers(subjects.live(_SCOPE, "run", kind="succeeded"), heard)


def test_the_other_subjects_are_parsed_back() -> None:
    assert subjects.parse_log(subjects.log(_SCOPE, _RUN, 2, "stdout")) == (_SCOPE, "run", _RUN, 2, "stdout")
    assert subjects.parse_io(subjects.io(_SCOPE, "ses_1", "out", "report")) == (_SCOPE, "ses_1", "out", "report")
    for kept in (True, False):
        written = subjects.exec_output(_SCOPE, "exec_1", "stdout", kept=kept)
        assert subjects.parse_exec_output(written) == (_SCOPE, "exec_1", "stdout")
    assert subjects.parse_due(subjects.due(_SCOPE, _RUN, "ttl")) == (_SCOPE, _RUN, "ttl")
    assert subjects.parse_api(subjects.api(_SCOPE, "run", "get")) == (_SCOPE, "run", "get")
    assert _covers(subjects.api_endpoint("run", "get"), subjects.api(_SCOPE, "run", "get"))


def test_what_a_message_is_about() -> None:
    assert subjects.about(subjects.event(_SCOPE, "run", _RUN, "queued", lane="default")) == _RUN
    assert subjects.about(subjects.due(_SCOPE, _RUN, "ttl")) == _RUN
    assert subjects.about(subjects.io(_SCOPE, "ses_1", "in", "notes")) == "ses_1"
    assert subjects.about("helmr.due.odd") == "helmr.due.odd"


def test_a_timer_is_apart_from_what_it_publishes() -> None:
    assert not _covers(subjects.ALL_TIMERS, subjects.due(_SCOPE, _RUN, "ttl"))
    assert not _covers(subjects.ALL_EVENTS, subjects.due(_SCOPE, _RUN, "ttl"))


@pytest.mark.parametrize("foreign", ["", "*", ">", "a.b", "a b", "a\r\nPUB x 0\r\n", "é", "a\t", "$JS"])
def test_nothing_foreign_gets_into_a_subject(foreign: str) -> None:
    with pytest.raises(UsageError):
        subjects.history(_SCOPE, "run", foreign)
    with pytest.raises(UsageError):
        subjects.event(_SCOPE, "run", foreign, "started")
    with pytest.raises(UsageError):
        subjects.io(_SCOPE, "ses_1", "out", f"x{foreign}" if foreign else "")
    with pytest.raises(UsageError):
        subjects.timer(_SCOPE, foreign, "ttl")
    with pytest.raises(UsageError):
        subjects.log(_SCOPE, _RUN, 1, f"x{foreign}" if foreign else "")
