"""Secrets, retries, queues and streams as declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helmr import ProjectError, Queue, Retry, Secret, registry, streams


def test_a_secret_goes_to_the_variable_of_its_name() -> None:
    assert Secret("TOKEN").env == "TOKEN"
    assert Secret("api_key", env="API_KEY") == Secret("api_key", env="API_KEY")


def test_a_secret_may_go_to_a_file() -> None:
    secret = Secret("deploy-key", file="/run/secrets/key", mode=0o440)
    assert (secret.env, secret.file, secret.mode) == (None, "/run/secrets/key", 0o440)


def test_retry_defaults() -> None:
    retry = Retry()
    assert (retry.max_attempts, retry.min_delay, retry.max_delay, retry.factor) == (3, 1, 30, 2)
    assert (retry.jitter, retry.codes) == (True, None)


def test_retry_takes_durations() -> None:
    retry = Retry(max_attempts=10, min_delay="2s", max_delay="5m", factor=1, jitter=False, codes=["task_error"])
    assert (retry.min_delay, retry.max_delay, retry.codes) == (2, 300, ("task_error",))


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Secret(""),
        lambda: Secret("has-dash"),
        lambda: Secret("TOKEN", env="2X"),
        lambda: Secret("TOKEN", file="token"),
        lambda: Secret("TOKEN", file="/workspace/token"),
        lambda: Secret("TOKEN", file="/run/../etc/passwd"),
        lambda: Retry(max_attempts=0),
        lambda: Retry(max_attempts=11),
        lambda: Retry(max_attempts=True),
        lambda: Retry(factor=0.5),
        lambda: Retry(min_delay="1m", max_delay="1s"),
        lambda: Retry(codes=["cancelled"]),
        lambda: Queue("no spaces"),
        lambda: Queue("q", concurrency=0),
        lambda: Queue("q", concurrency=1001),
        lambda: Queue("q", concurrency=True),
        lambda: Queue("q", concurrency_per_key=-1),
        lambda: Queue("q", concurrency=1.5),  # type: ignore[arg-type]
        lambda: streams.output("a.b"),
        lambda: streams.input(""),
    ],
)
def test_nonsense_is_refused_with_its_place(declare: Callable[[], Any]) -> None:
    with pytest.raises(ProjectError, match=r"test_declarations\.py:\d+: "):
        declare()


def test_a_queue_may_be_named_twice_but_not_in_two_ways() -> None:
    assert Queue("q", concurrency=2) == Queue("q", concurrency=2)
    with pytest.raises(ProjectError, match="queue 'q' is defined in two ways"):
        Queue("q", concurrency=3)
    assert registry.queues["q"].concurrency == 2


def test_streams_are_registered_with_their_schema() -> None:
    report = streams.output("report", schema=dict)
    approval = streams.input("approval")
    assert registry.streams == {"report": report, "approval": approval}
    assert streams.output("report", schema=dict) == report
    with pytest.raises(ProjectError, match="stream 'report' is defined in two ways"):
        streams.input("report")
