"""Metrics: what the page says about them, and how they are counted."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client as Nats

from bus.exposition import Address
from bus.live import LiveRuns
from bus.metrics import DISPATCH, DISPATCH_BUCKETS, ENDED, FAILED, LEASES_LOST, SERVER, Histogram, ServerMetrics
from bus.presence import Presence
from bus.services.endpoint import Tally
from helmr.errors import UsageError
from tests.lives import SCOPE, Life
from worker.metrics import WORKER

PAGE = Path(__file__).parents[2] / "docs/reference/metrics.md"
_ROW = re.compile(r"^\| `(helmr_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.+) \|$", re.MULTILINE)


def test_the_page_lists_every_metric_as_the_code_has_it() -> None:
    rows = _ROW.findall(PAGE.read_text())
    listed = [(name, kind, tuple(labels.split(", ")) if labels else (), told) for name, kind, labels, told in rows]
    assert listed == [(metric.name, metric.kind, metric.labels, metric.help) for metric in (*SERVER, *WORKER)]


def test_every_label_is_explained_and_none_is_an_id() -> None:
    explained = PAGE.read_text().partition("## Labels")[2]
    labels = {label for metric in (*SERVER, *WORKER) for label in metric.labels}
    assert all(f"`{label}`" in explained for label in labels)
    assert not labels & {"run", "run_id", "session", "workspace", "worker", "id"}


def test_names_follow_the_conventions() -> None:
    for metric in (*SERVER, *WORKER):
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_a_histogram_counts_into_all_buckets_above() -> None:
    histogram = Histogram()
    for seconds in (0.001, 0.3, 9999.0):
        histogram.observe(seconds)
    listed = dict(histogram.cumulative())
    assert (listed["0.001"], listed["0.25"], listed["0.5"], listed["1800.0"], listed["+Inf"]) == (1, 1, 2, 2, 3)
    assert len(listed) == len(DISPATCH_BUCKETS) + 1
    assert histogram.total == pytest.approx(9999.301)


def test_events_are_counted() -> None:
    nc = Nats()
    metrics = ServerMetrics(nc, LiveRuns(), Presence(nc), Tally())
    for life in (
        Life(task_id="review").queued().leased().succeeds(),
        Life(task_id="review").queued().leased().add("lease_lost", {"worker": "wrk_1", "reason": "gone"}),
        Life(task_id="review").queued().leased().fails("task_exit"),
    ):
        for event in life.events:
            if event.kind in {"leased", "lease_lost", "succeeded", "failed"}:
                metrics.take(SCOPE, event.kind, msgspec.json.encode(event))
    read = dict(metrics._runs())
    assert read[ENDED] == {(*SCOPE, "review", "succeeded"): 1, (*SCOPE, "review", "failed"): 1}
    assert read[FAILED] == {(*SCOPE, "review", "task_exit"): 1}
    assert read[LEASES_LOST] == {SCOPE: 1}
    assert dict(read[DISPATCH][SCOPE].cumulative())["1.0"] == 3


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9400", ("127.0.0.1", 9400)),
        ("0.0.0.0:9400", ("0.0.0.0", 9400)),
        ("[::1]:0", ("::1", 0)),
        (":9400", ("127.0.0.1", 9400)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize("text", ["", "x", "localhost", "1:99999", "1:-1"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="PORT"):
        Address.parse(text)
