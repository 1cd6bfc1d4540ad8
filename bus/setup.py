"""Brings the streams and buckets of :mod:`bus.topology` into being, and keeps their configuration up to date."""

from __future__ import annotations

import logging
from typing import Any

import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.api import KeyValueConfig, ObjectStoreConfig, StreamConfig

from bus import topology
from bus.requests import api
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

_EXISTS = 10058
#: The server's default, in nanoseconds; it must not exceed the age limit.
_DUPLICATE_WINDOW = int(120e9)


async def ensure_topology(nc: Nats) -> None:
    """Create what is missing and update what differs; safe to call from several processes at once.

    Raises:
        Unavailable: JetStream refuses, e.g. because the disk is full.
    """
    for config, extra in topology.streams():
        await _ensure_stream(nc, config, extra)
    await _ensure_bucket(nc, KeyValueConfig(bucket=topology.CONFIG_BUCKET, history=1))
    await _ensure_bucket(nc, KeyValueConfig(bucket=topology.CHECKPOINTS_BUCKET, history=1))
    await _ensure_bucket(nc, KeyValueConfig(bucket=topology.SECRETS_BUCKET, history=1))
    await _ensure_bucket(nc, KeyValueConfig(bucket=topology.PRESENCE_BUCKET, ttl=topology.PRESENCE_TTL))
    for bucket in (topology.ARTIFACTS, topology.VERSIONS):
        try:
            await nc.jetstream().create_object_store(bucket, ObjectStoreConfig())
        except nats.js.errors.APIError as error:
            raise Unavailable(f"JetStream cannot create a bucket: {error.description}") from error


async def _ensure_bucket(nc: Nats, config: KeyValueConfig) -> None:
    try:
        await nc.jetstream().create_key_value(config)
    except nats.js.errors.APIError as error:
        if error.err_code != _EXISTS:
            raise Unavailable(f"JetStream cannot create bucket {config.bucket}: {error.description}") from error
        # An older version made it, with another time to live.
        ttl = int((config.ttl or 0) * 1e9)
        window = min(ttl, _DUPLICATE_WINDOW) or _DUPLICATE_WINDOW
        await _update(nc, f"KV_{config.bucket}", {"max_age": ttl, "duplicate_window": window})


async def _ensure_stream(nc: Nats, config: StreamConfig, extra: dict[str, Any]) -> None:
    wanted = config.as_dict() | extra
    found = await api(nc, f"STREAM.INFO.{config.name}", None)
    if "error" in found:
        created = await api(nc, f"STREAM.CREATE.{config.name}", wanted)
        error = created.get("error")
        if error and error.get("err_code") != _EXISTS:
            raise Unavailable(f"JetStream cannot create stream {config.name}: {error['description']}")
        return
    if any(found["config"].get(key) != value for key, value in wanted.items() if value is not None):
        await _update(nc, str(config.name), wanted)


async def _update(nc: Nats, stream: str, wanted: dict[str, Any]) -> None:
    found = await api(nc, f"STREAM.INFO.{stream}", None)
    updated = await api(nc, f"STREAM.UPDATE.{stream}", found["config"] | wanted)
    if "error" in updated:
        log.warning("stream %s keeps its settings: %s", stream, updated["error"]["description"])
