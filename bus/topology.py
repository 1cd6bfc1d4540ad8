"""Every stream, consumer and bucket of Helmr, declared here and nowhere else.

Retention is by entity, never by age: a run may wait for months, and an age limit would take its state with it.
"""

from __future__ import annotations

import os
from typing import Any

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from helmr import subjects
from helmr.events import TERMINAL

RUNS = "RUNS"
SESSIONS = "SESSIONS"
LOGS = "LOGS"
#: What execs write: apart from the logs of runs, because of each only the latest part is kept, and no history is made of it.
EXECS = "EXECS"
CONFIG_BUCKET = "config"
PRESENCE_BUCKET = "presence"
#: Where readers remember how far they are, so that a restart does not read the log from its beginning.
CHECKPOINTS_BUCKET = "checkpoints"
SECRETS_BUCKET = "secrets"
#: The stream behind the bucket of deployments; the projector reads it like any other.
CONFIG = f"KV_{CONFIG_BUCKET}"
#: The key of that bucket under which the projector says how far it is: see :mod:`bus.watermark`.
WATERMARK_KEY = "history.watermark"
ARTIFACTS = "artifacts"
#: Packs and manifests of workspace versions: apart, because what nobody refers to is collected there.
VERSIONS = "versions"

#: For tests alone: what the three times below are multiplied by. All parts of an installation must be given the same.
_PACE = float(os.environ.get("HELMR_TEST_PACE", "1"))
#: Seconds without an acknowledgement or a heartbeat after which a dispatch message goes to another worker.
ACK_WAIT = 15.0 * _PACE
#: Seconds between heartbeats of a worker on its dispatch messages, and on its presence key.
HEARTBEAT = 3.0 * _PACE
#: Seconds a presence key lives without renewal: less than the ack deadline, so that a worker whose messages are delivered
#: to others counts as gone by then.
PRESENCE_TTL = 9.0 * _PACE

#: Seconds of silence after which a worker without a connection counts as gone, too: two heartbeats and some.
SUSPECT_AFTER = 6.5 * _PACE

#: Log chunks are dropped, oldest first, beyond this many bytes and this age (seconds).
LOG_BYTES = 20 * 1024**3
LOG_AGE = 7 * 86400.0
#: The same for what execs write.
EXEC_BYTES = 10 * 1024**3
EXEC_AGE = 7 * 86400.0


def streams() -> list[tuple[StreamConfig, dict[str, Any]]]:
    """The streams, each with the settings nats-py's config class does not know."""
    runs = StreamConfig(
        name=RUNS,
        subjects=[subjects.ALL_EVENTS, subjects.ALL_TIMERS, subjects.ALL_DUE],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        allow_direct=True,
        republish=RePublish(src=subjects.ALL_EVENTS, dest=subjects.ALL_LIVE),
    )
    sessions = StreamConfig(
        name=SESSIONS,
        subjects=[subjects.ALL_IO, subjects.ALL_ONCE],
        storage=StorageType.FILE,
        allow_direct=True,
    )
    logs = StreamConfig(
        name=LOGS,
        subjects=[subjects.ALL_LOGS],
        storage=StorageType.FILE,
        allow_direct=True,
        max_bytes=LOG_BYTES,
        max_age=LOG_AGE,
    )
    execs = StreamConfig(
        name=EXECS,
        subjects=[subjects.ALL_EXEC_OUTPUT],
        storage=StorageType.FILE,
        allow_direct=True,
        max_bytes=EXEC_BYTES,
        max_age=EXEC_AGE,
    )
    return [
        (runs, {"allow_msg_schedules": True, "allow_msg_ttl": True}),
        (sessions, {}),
        # Not persist_mode async: it acknowledges chunks that a killed server then does not have. What it would save is
        # fsyncs of chatty runs: 9,000 chunks of three streams in turns took 3.3 s with it and 13 s without (durability
        # strict), 1.8 s and 2.2 s (relaxed); 60 MiB of one stream 0.7 s and 1.0 s.
        (logs, {}),
        (execs, {}),
    ]


def bucket_subject(bucket: str, key: str) -> str:
    """The subject a key of a bucket is stored under."""
    return f"$KV.{bucket}.{key}"


def lane_consumer_name(lane: str) -> str:
    """The durable consumer of a lane: group ``default``, worker ``@wrk_…``, host ``~host_…``."""
    prefix = {"@": "worker-", "~": "host-"}.get(lane[0], "group-")
    return f"lane-{prefix}{lane.lstrip('@~')}"


def lane_consumer(lane: str) -> ConsumerConfig:
    """Dispatch of one lane: straight from the log, by ack deadline. Redelivery is unlimited; the run's state counts."""
    return ConsumerConfig(
        durable_name=lane_consumer_name(lane),
        filter_subject=subjects.lane(lane),
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT,
        max_ack_pending=-1,
        max_waiting=4096,
    )


def reactor_consumer(name: str, kinds: list[str]) -> ConsumerConfig:
    """A durable consumer that turns facts into next facts; ``kinds`` are filters over RUNS."""
    return ConsumerConfig(
        durable_name=f"reactor-{name}",
        filter_subjects=kinds,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=30.0,
        max_ack_pending=1000,
    )


def trace_consumer() -> ConsumerConfig:
    """The ends of runs, for the export of traces: from the first time it is made, not from the beginning of the log."""
    return ConsumerConfig(
        durable_name="traces",
        filter_subjects=[subjects.of_kind("run", kind) for kind in sorted(TERMINAL)],
        deliver_policy=DeliverPolicy.NEW,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=60.0,
        max_ack_pending=1000,
    )


def janitor_consumer(ends: list[str]) -> ConsumerConfig:
    """The ends of entities, in order. It stops at the first that are not due: no more than these are in hand."""
    return ConsumerConfig(
        durable_name="janitor",
        filter_subjects=ends,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=60.0,
        max_ack_pending=256,
    )
